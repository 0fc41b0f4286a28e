"""A plug-in that tests install: the decoder with experts in place of its MLP, and facts about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.config_fields import Fields
from tiny_llm.families.family import Family
from tiny_llm.layers.attention import Attention
from tiny_llm.layers.embedding import Embedding
from tiny_llm.layers.linear import Linear
from tiny_llm.layers.mlp import MLP
from tiny_llm.layers.named import Shapes, Weights, under
from tiny_llm.layers.norm import RMSNorm
from tiny_llm.models.decoder import Decoder, DecoderLayer
from tiny_llm.models.registry import Architecture
from tiny_llm.ops.rope import rope_frequencies

OWN = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


@dataclass(frozen=True)
class MoeConfig(ModelConfig):
    """The decoder's facts, and three about experts. A token goes through ``experts_per_token`` of them."""

    num_experts: int
    experts_per_token: int
    expert_size: int

    @classmethod
    def from_hf(cls, raw: Mapping[str, object], family: Family | None = None) -> MoeConfig:
        own = Fields(raw)
        experts, chosen, size = (own.whole(name) for name in OWN)
        rest = {name: value for name, value in raw.items() if name not in OWN}
        plain = ModelConfig.from_hf(rest | {"intermediate_size": chosen * size}, family or Family())
        shared = {field.name: getattr(plain, field.name) for field in fields(ModelConfig)}
        return cls(**shared, num_experts=experts, experts_per_token=chosen, expert_size=size)

    @property
    def of_an_expert(self) -> ModelConfig:
        """The config of one expert alone."""
        return replace(self, intermediate_size=self.expert_size)


@dataclass(frozen=True)
class Experts:
    """x [T, E] to [T, E]: the sum of the chosen experts' outputs, by their share of the router's softmax."""

    router: Linear
    experts: tuple[MLP, ...]
    chosen: int

    @staticmethod
    def shapes(config: MoeConfig) -> Shapes:
        found = under("router", Linear.shapes(config.hidden_size, config.num_experts, bias=False))
        for i in range(config.num_experts):
            found |= under(f"experts.{i}", MLP.shapes(config.of_an_expert))
        return found

    @classmethod
    def take(cls, weights: Weights, prefix: str, config: MoeConfig) -> Experts:
        names = [f"{prefix}.experts.{i}" for i in range(config.num_experts)]
        experts = tuple(MLP.take(weights, name, config.of_an_expert) for name in names)
        return cls(Linear.take(weights, f"{prefix}.router", bias=False), experts, config.experts_per_token)

    def __call__(self, x: mx.array) -> mx.array:
        scores = self.router(x).astype(mx.float32)
        least = mx.sort(scores, axis=-1)[:, -self.chosen][:, None]
        shares = mx.softmax(mx.where(scores >= least, scores, -mx.inf), axis=-1).astype(x.dtype)
        outputs = [expert(x) * shares[:, i : i + 1] for i, expert in enumerate(self.experts)]
        return sum(outputs[1:], outputs[0])


def shapes(config: MoeConfig) -> Shapes:
    """The decoder's tensors, with those of experts for those of its MLP."""
    plain = Decoder.shapes(config)
    found = {name: shape for name, shape in plain.items() if ".mlp." not in name}
    for i in range(config.num_layers):
        found |= under(f"model.layers.{i}.mlp", Experts.shapes(config))
    return found


def build(config: MoeConfig, weights: Weights) -> Decoder:
    """The decoder itself, with experts where its layers have the MLP."""
    inv_freq = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    layers = []
    for i in range(config.num_layers):
        prefix, eps = f"model.layers.{i}", config.rms_norm_eps
        before, after = f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"
        attention = Attention.take(weights, f"{prefix}.self_attn", config, i, inv_freq)
        experts = Experts.take(weights, f"{prefix}.mlp", config)
        norms = RMSNorm.take(weights, before, eps), RMSNorm.take(weights, after, eps)
        layers.append(DecoderLayer(norms[0], attention, norms[1], experts))  # type: ignore[arg-type]
    embed = Embedding.take(weights, config)
    norm = RMSNorm.take(weights, "model.norm", config.rms_norm_eps)
    return Decoder(config, embed, tuple(layers), norm, embed.as_head())


TINY_MOE = Architecture(MoeConfig.from_hf, shapes, build, packed=True, unread=(".rotary_emb.inv_freq",))
