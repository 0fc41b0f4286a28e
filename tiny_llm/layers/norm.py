"""RMSNorm with its weight."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from tiny_llm.layers.named import Weights, vector
from tiny_llm.ops.rms_norm import add_rms_norm, rms_norm


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Normalises the last axis of x [..., E] and scales it by weight [E]."""

    weight: mx.array
    eps: float

    @classmethod
    def take(cls, weights: Weights, prefix: str, eps: float) -> RMSNorm:
        """Pick ``prefix``.weight. Raises WeightError when it is missing."""
        return cls(vector(weights, f"{prefix}.weight"), eps)

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)

    def after(self, x: mx.array, residual: mx.array | None) -> tuple[mx.array, mx.array]:
        """Return ``x + residual`` and its norm; None adds nothing."""
        if residual is None:
            return x, self(x)
        return add_rms_norm(x, residual, self.weight, self.eps)
