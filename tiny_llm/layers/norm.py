"""Norms with their weights, and the maps whose results are added to a token's vector, perhaps normed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.distributed.group import ALONE, Group
from tiny_llm.layers.gathered import gathering
from tiny_llm.layers.linear import Linear
from tiny_llm.layers.named import Shapes, Weights, under, vector
from tiny_llm.ops.layer_norm import layer_norm
from tiny_llm.ops.rms_norm import add_rms_norm, rms_norm

OutputMap = Callable[[mx.array], mx.array]  # x [T, I], or its heads [T, H, D], to [T, E]


@dataclass(frozen=True, slots=True)
class Norm:
    """Normalises the last axis of x [..., E]. This one does not: OLMo-2 has none where others have theirs."""

    def __call__(self, x: mx.array) -> mx.array:
        return x

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


@dataclass(frozen=True, slots=True)
class FinishedLinear:
    """``scale * norm(linear(x))``; without a norm it is left out."""

    linear: Linear
    norm: Norm | None
    scale: float

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        y = y if self.norm is None else self.norm(y)
        return y if self.scale == 1 else y * self.scale


def output_shapes(config: ModelConfig, name: str, inputs: int, *, bias: bool) -> Shapes:
    """The tensors that ``take_output`` reads, without their prefix."""
    shapes = under(name, Linear.shapes(inputs, config.hidden_size, bias=bias))
    return shapes | under("output_norm", norm_shapes(config)) if config.norm_after else shapes


def take_output(
    weights: Weights, prefix: str, name: str, config: ModelConfig, *, bias: bool, group: Group = ALONE
) -> OutputMap:
    """Pick the map ``prefix``.``name``, and its norm. Raises WeightError for a tensor that is missing."""
    own = Linear.take(weights, f"{prefix}.{name}", bias=bias)
    linear = gathering(own, group, config.hidden_size)
    norm = take_norm(weights, f"{prefix}.output_norm", config) if config.norm_after else None
    plain = norm is None and config.residual_scale == 1
    return linear if plain else FinishedLinear(linear, norm, config.residual_scale)
