"""Named arrays, and the strict picking of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import mlx.core as mx

from tiny_llm.data import Matrix
from tiny_llm.errors import WeightError

Weights: TypeAlias = Mapping[str, Matrix]
Shapes: TypeAlias = dict[str, tuple[int, ...]]


def matrix(weights: Weights, name: str) -> Matrix:
    """Return the matrix ``name``, in whatever format. Raises WeightError when it is absent."""
    if name not in weights:
        raise WeightError(f"tensor {name!r} is missing. The checkpoint does not fit its config.json.")
    return weights[name]


def vector(weights: Weights, name: str) -> mx.array:
    """Return the array ``name``. Raises WeightError when it is absent or quantized."""
    value = matrix(weights, name)
    if not isinstance(value, mx.array):
        raise WeightError(f"tensor {name!r} is quantized, expected a plain array: only matrices may be.")
    return value


def under(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Return ``shapes`` with ``prefix`` and a dot before each name."""
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}
