"""The MLP of a decoder layer, or a mixture of experts in its place."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.data import Matrix
from tiny_llm.distributed.group import ALONE, Group
from tiny_llm.families.family import ExpertFacts
from tiny_llm.layers.gathered import columns, gathered
from tiny_llm.layers.linear import Linear, gated_by
from tiny_llm.layers.named import Shapes, Weights, matrix, under, vector
from tiny_llm.layers.norm import OutputMap, output_shapes, take_output
from tiny_llm.ops.experts import Routing, experts, experts_down, experts_gated
from tiny_llm.ops.swiglu import gelu

_KINDS = ("gate", "up", "down")


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


@dataclass(frozen=True, slots=True)
class Experts:
    """x [T, E] to [T, E]: by k of N experts, which a router chooses, and perhaps by one that all go through.

    Tensors are named as mlx-lm does it: an expert a row of ``switch_mlp.gate_proj.weight`` [N, F, E].
    """

    router: Linear
    routing: Routing
    gate_proj: Matrix
    up_proj: Matrix
    down_proj: Matrix
    shared: MLP | GeluMLP | None
    shared_gate: Linear | None
    group: Group = ALONE

    @staticmethod
    def shapes(config: ModelConfig, facts: ExpertFacts) -> Shapes:
        """The tensors that ``take`` reads, without their prefix."""
        N, E, F = facts.count, config.hidden_size, facts.width
        shapes: Shapes = {
            "gate.weight": (N, E),
            "switch_mlp.gate_proj.weight": (N, F, E),
            "switch_mlp.up_proj.weight": (N, F, E),
            "switch_mlp.down_proj.weight": (N, E, F),
        }
        if facts.corrected:
            shapes["moe_statics.e_score_correction_bias"] = (N,)
        if facts.shared_width:
            shapes |= under("shared_expert", MLP.shapes(config, facts.shared_width))
        if facts.shared_gated:
            shapes["shared_expert_gate.weight"] = (1, E)
        return shapes

    @classmethod
    def take(
        cls, weights: Weights, prefix: str, config: ModelConfig, facts: ExpertFacts, group: Group = ALONE
    ) -> Experts:
        """Pick the tensors below ``prefix``. Raises WeightError for one that is missing."""
        gate, up, down = (matrix(weights, f"{prefix}.switch_mlp.{kind}_proj.weight") for kind in _KINDS)
        corrected, gated = facts.corrected, facts.shared_gated
        correction = vector(weights, f"{prefix}.moe_statics.e_score_correction_bias") if corrected else None
        return cls(
            Linear.take(weights, f"{prefix}.gate", bias=False),
            Routing(facts.per_token, facts.normalised, correction),
            gate,
            up,
            down,
            MLP.take(weights, f"{prefix}.shared_expert", config, group) if facts.shared_width else None,
            Linear.take(weights, f"{prefix}.shared_expert_gate", bias=False) if gated else None,
            group,
        )

    def __call__(self, x: mx.array) -> mx.array:
        logits = self.router(x.astype(mx.float32))
        y = self._chosen(x, logits)
        if self.shared is None:
            return y
        shared = self.shared(x)
        return y + (shared if self.shared_gate is None else mx.sigmoid(self.shared_gate(x)) * shared)

    def _chosen(self, x: mx.array, logits: mx.array) -> mx.array:
        """What the chosen ones add up to; where each rank has some outputs of every expert, in two parts."""
        if self.group.size == 1:
            return experts(x, logits, self.routing, self.gate_proj, self.up_proj, self.down_proj)
        hidden = experts_gated(x, logits, self.routing, self.gate_proj, self.up_proj)
        hidden = gathered(hidden, self.group, columns(self.down_proj))
        return gathered(experts_down(hidden, logits, self.routing, self.down_proj), self.group, x.shape[1])
