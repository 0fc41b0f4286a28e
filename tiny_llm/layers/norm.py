"""Norms with their weights: RMSNorm, LayerNorm, and none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.layers.named import Shapes, Weights, vector
from tiny_llm.ops.layer_norm import layer_norm
from tiny_llm.ops.rms_norm import add_rms_norm, rms_norm


class Norm(ABC):
    """Normalises the last axis of x [..., E]."""

    __slots__ = ()

    @abstractmethod
    def __call__(self, x: mx.array) -> mx.array:
        """The norm of x, in its dtype."""

    def after(self, x: mx.array, residual: mx.array | None) -> tuple[mx.array, mx.array]:
        """Return ``x + residual`` and its norm; None adds nothing."""
        total = x if residual is None else x + residual
        return total, self(total)


@dataclass(frozen=True, slots=True)
class RMSNorm(Norm):
    """Normalises the last axis of x [..., E] and scales it by weight [E].

    Where the weight is of float32 and x is not, both are done in float32 (Gemma, OLMo-2).
    """

    weight: mx.array
    eps: float

    @classmethod
    def take(cls, weights: Weights, prefix: str, eps: float) -> RMSNorm:
        """Pick ``prefix``.weight. Raises WeightError when it is missing."""
        return cls(vector(weights, f"{prefix}.weight"), eps)

    def __call__(self, x: mx.array) -> mx.array:
        if self.weight.dtype == x.dtype:
            return rms_norm(x, self.weight, self.eps)
        return rms_norm(x.astype(self.weight.dtype), self.weight, self.eps).astype(x.dtype)

    def after(self, x: mx.array, residual: mx.array | None) -> tuple[mx.array, mx.array]:
        """The same; by one kernel where it can."""
        if residual is None or self.weight.dtype != x.dtype:
            return Norm.after(self, x, residual)
        return add_rms_norm(x, residual, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class LayerNorm(Norm):
    """Centres and normalises the last axis of x [..., E], scales it by weight [E] and adds bias [E]."""

    weight: mx.array
    bias: mx.array
    eps: float

    def __call__(self, x: mx.array) -> mx.array:
        return layer_norm(x, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class NoNorm(Norm):
    """Where other families have one before attention or the MLP, and this one has it behind (OLMo-2)."""

    def __call__(self, x: mx.array) -> mx.array:
        return x


def norm_shapes(config: ModelConfig) -> Shapes:
    """The tensors of a norm over a token's vector, without their prefix."""
    weight: Shapes = {"weight": (config.hidden_size,)}
    return weight | {"bias": (config.hidden_size,)} if config.norm == "layer" else weight


def take_norm(weights: Weights, prefix: str, config: ModelConfig) -> Norm:
    """Pick the norm below ``prefix``, of the config's kind. Raises WeightError for a missing tensor."""
    if config.norm == "layer":
        weight, bias = (vector(weights, f"{prefix}.{name}") for name in ("weight", "bias"))
        return LayerNorm(weight, bias, config.rms_norm_eps)
    return take_rms_norm(weights, prefix, config)


def take_rms_norm(weights: Weights, prefix: str, config: ModelConfig) -> RMSNorm:
    """Pick ``prefix``.weight, wide if the config wants that. Raises WeightError when it is missing."""
    found = RMSNorm.take(weights, prefix, config.rms_norm_eps)
    return RMSNorm(found.weight.astype(mx.float32), found.eps) if config.wide_norm else found
