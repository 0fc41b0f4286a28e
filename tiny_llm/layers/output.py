"""The maps whose results are added to a token's vector: perhaps normed or scaled before that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.distributed.group import ALONE, Group
from tiny_llm.layers.gathered import gathering
from tiny_llm.layers.linear import Linear
from tiny_llm.layers.named import Shapes, Weights, under
from tiny_llm.layers.norm import Norm, norm_shapes, take_norm

OutputMap = Callable[[mx.array], mx.array]
"""x [T, I], or its heads [T, H, D], to [T, E]."""


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
