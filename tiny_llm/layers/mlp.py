"""The gated MLP of a decoder layer."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.layers.linear import Linear, gated_by
from tiny_llm.layers.named import Shapes, Weights, under


@dataclass(frozen=True, slots=True)
class MLP:
    """``down(silu(gate(x)) * up(x))``: x [T, E] to [T, E] through F."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    @staticmethod
    def shapes(config: ModelConfig, width: int | None = None) -> Shapes:
        """The tensors that ``take`` reads, without their prefix; F is ``width``, else intermediate_size."""
        E, F, bias = config.hidden_size, width or config.intermediate_size, config.mlp_bias
        return {
            **under("gate_proj", Linear.shapes(E, F, bias=bias)),
            **under("up_proj", Linear.shapes(E, F, bias=bias)),
            **under("down_proj", Linear.shapes(F, E, bias=bias)),
        }

    @classmethod
    def take(cls, weights: Weights, prefix: str, config: ModelConfig) -> MLP:
        """Pick the three maps below ``prefix``. Raises WeightError for a tensor that is missing."""
        gate = Linear.take(weights, f"{prefix}.gate_proj", bias=config.mlp_bias)
        up = Linear.take(weights, f"{prefix}.up_proj", bias=config.mlp_bias)
        down = Linear.take(weights, f"{prefix}.down_proj", bias=config.mlp_bias)
        return cls(gate, up, down)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(gated_by(x, self.gate_proj, self.up_proj))
