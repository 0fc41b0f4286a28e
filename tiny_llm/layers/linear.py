"""Linear maps with their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from tiny_llm.data import Matrix
from tiny_llm.layers.named import Shapes, Weights, matrix, vector
from tiny_llm.ops.linear import gated, linear, linears


@dataclass(frozen=True, slots=True)
class Linear:
    """``x weight^T + bias``: x [T, I], or its heads [T, H, D], to [T, O]."""

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


def heads_of(x: mx.array, maps: Sequence[Linear], head_dim: int) -> list[mx.array]:
    """Return each map's output for one x [T, I], as heads [T, O / head_dim, head_dim], perhaps flat still."""
    return linears(x, [m.weight for m in maps], [m.bias for m in maps], head_dim)


def gated_by(x: mx.array, gate: Linear, up: Linear) -> mx.array:
    """Return ``silu(gate(x)) * up(x)`` [T, F] for x [T, I]."""
    return gated(x, gate.weight, up.weight, gate.bias, up.bias)
