"""A linear map with its weights."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from tiny_llm.layers.named import Matrix, Shapes, Weights, matrix, vector
from tiny_llm.ops.linear import linear


@dataclass(frozen=True, slots=True)
class Linear:
    """``x weight^T + bias``: x [T, I] to [T, O]."""

    weight: Matrix
    bias: mx.array | None = None

    @staticmethod
    def shapes(inputs: int, outputs: int, *, bias: bool) -> Shapes:
        """The tensors that ``take`` reads, without their prefix."""
        shapes: Shapes = {"weight": (outputs, inputs)}
        return shapes | {"bias": (outputs,)} if bias else shapes

    @classmethod
    def take(cls, weights: Weights, prefix: str, *, bias: bool) -> Linear:
        """Pick ``prefix``.weight, and .bias if asked. Raises WeightError for one that is missing."""
        return cls(matrix(weights, f"{prefix}.weight"), vector(weights, f"{prefix}.bias") if bias else None)

    def __call__(self, x: mx.array) -> mx.array:
        return linear(x, self.weight, self.bias)
