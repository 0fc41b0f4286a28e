"""The MLP of a decoder layer."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.distributed.group import ALONE, Group
from tiny_llm.layers.linear import Linear, gated_by
from tiny_llm.layers.named import Shapes, Weights, under
from tiny_llm.layers.norm import OutputMap, output_shapes, take_output
from tiny_llm.ops.swiglu import gelu


@dataclass(frozen=True, slots=True)
class MLP:
    """``down(silu(gate(x)) * up(x))``: x [T, E] to [T, E] through F."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: OutputMap

    @staticmethod
    def shapes(config: ModelConfig, width: int | None = None) -> Shapes:
        """The tensors that ``take`` reads, without their prefix; F is ``width``, else the usual."""
        usual = config.intermediate_size if config.experts is None else config.experts.dense_width
        E, F, bias = config.hidden_size, width or usual, config.mlp_bias
        gate = under("gate_proj", Linear.shapes(E, F, bias=bias)) if config.mlp != "gelu" else {}
        up = under("up_proj", Linear.shapes(E, F, bias=bias))
        return {**gate, **up, **output_shapes(config, "down_proj", F, bias=bias)}

    @classmethod
    def take(cls, weights: Weights, prefix: str, config: ModelConfig, group: Group = ALONE) -> MLP | GeluMLP:
        """Pick the maps below ``prefix``. Raises WeightError for a tensor that is missing."""
        bias = config.mlp_bias
        up = Linear.take(weights, f"{prefix}.up_proj", bias=bias)
        down = take_output(weights, prefix, "down_proj", config, bias=bias, group=group)
        if config.mlp == "gelu":
            return GeluMLP(None, up, down)
        gate = Linear.take(weights, f"{prefix}.gate_proj", bias=bias)
        return cls(gate, up, down) if config.mlp == "swiglu" else GeluMLP(gate, up, down)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(gated_by(x, self.gate_proj, self.up_proj))


@dataclass(frozen=True, slots=True)
class GeluMLP:
    """``down(gelu(gate(x)) * up(x))`` (Gemma), or without a gate ``down(gelu(up(x)))`` (GPT-2)."""

    gate_proj: Linear | None
    up_proj: Linear
    down_proj: OutputMap

    def __call__(self, x: mx.array) -> mx.array:
        up = self.up_proj(x)
        return self.down_proj(gelu(up) if self.gate_proj is None else gelu(self.gate_proj(x)) * up)
