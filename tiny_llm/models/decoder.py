"""The decoder of LLaMA, Mistral, Qwen2 and Qwen3: one class, shaped by its config's facts.

Owns the wiring and the Hugging Face tensor names. Knows no cache, no checkpoint
file and no tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.data import Batch, KVCache
from tiny_llm.layers.attention import Attention
from tiny_llm.layers.embedding import Embedding
from tiny_llm.layers.experts import Experts
from tiny_llm.layers.linear import Linear
from tiny_llm.layers.mlp import MLP
from tiny_llm.layers.named import Shapes, Weights, under
from tiny_llm.layers.norm import RMSNorm
from tiny_llm.ops.rope import rope_frequencies


def _mlp_shapes(config: ModelConfig, layer: int) -> Shapes:
    facts = config.experts
    if facts is not None and layer in facts.layers:
        return Experts.shapes(config, facts)
    return MLP.shapes(config, None if facts is None else facts.dense_width)


def _take_mlp(weights: Weights, prefix: str, config: ModelConfig, layer: int) -> MLP | Experts:
    facts = config.experts
    if facts is not None and layer in facts.layers:
        return Experts.take(weights, prefix, config, facts)
    return MLP.take(weights, prefix, config)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention, then MLP or experts, each on the normed input and added to it (pre-norm residual).

    What is to be added waits for the norm that reads the sum next, so that one kernel does both.
    """

    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: MLP | Experts

    @staticmethod
    def shapes(config: ModelConfig, layer: int = 0) -> Shapes:
        """The tensors that ``take`` reads, without their prefix."""
        return {
            "input_layernorm.weight": (config.hidden_size,),
            **under("self_attn", Attention.shapes(config)),
            "post_attention_layernorm.weight": (config.hidden_size,),
            **under("mlp", _mlp_shapes(config, layer)),
        }

    @classmethod
    def take(cls, weights: Weights, config: ModelConfig, layer: int, inv_freq: mx.array) -> DecoderLayer:
        """Pick layer ``layer``'s tensors. Raises WeightError for one that is missing."""
        prefix, eps = f"model.layers.{layer}", config.rms_norm_eps
        return cls(
            RMSNorm.take(weights, f"{prefix}.input_layernorm", eps),
            Attention.take(weights, f"{prefix}.self_attn", config, layer, inv_freq),
            RMSNorm.take(weights, f"{prefix}.post_attention_layernorm", eps),
            _take_mlp(weights, f"{prefix}.mlp", config, layer),
        )

    def __call__(
        self, x: mx.array, residual: mx.array | None, batch: Batch, kv: KVCache
    ) -> tuple[mx.array, mx.array]:
        """Return x [T, E] with attention added, and what the MLP adds; ``residual`` is the last layer's."""
        x, normed = self.input_layernorm.after(x, residual)
        x, normed = self.post_attention_layernorm.after(x, self.self_attn(normed, batch, kv))
        return x, self.mlp(normed)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A pure function of a batch and a cache: tokens [T] to logits [R, V] in the weights' dtype."""

    config: ModelConfig
    embed_tokens: Embedding
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    lm_head: Linear

    @property
    def inv_freq(self) -> mx.array:
        """By what keys are turned a position, [D/2]."""
        return self.layers[0].self_attn.inv_freq

    @staticmethod
    def shapes(config: ModelConfig) -> Shapes:
        """Every tensor of a checkpoint by its Hugging Face name, in its unquantized shape."""
        V, E = config.vocab_size, config.hidden_size
        shapes: Shapes = {"model.embed_tokens.weight": (V, E)}
        for layer in range(config.num_layers):
            shapes |= under(f"model.layers.{layer}", DecoderLayer.shapes(config, layer))
        shapes["model.norm.weight"] = (E,)
        return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": (V, E)}

    @classmethod
    def take(cls, config: ModelConfig, weights: Weights) -> Decoder:
        """Pick the tensors that ``shapes`` names. Raises WeightError for one that is missing."""
        # One array for all layers: the frequencies are the model's, and no tensor of the checkpoint.
        inv_freq = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        embed = Embedding.take(weights, "model.embed_tokens")
        layers = tuple(DecoderLayer.take(weights, config, i, inv_freq) for i in range(config.num_layers))
        norm = RMSNorm.take(weights, "model.norm", config.rms_norm_eps)
        tied = config.tie_word_embeddings
        head = embed.as_head() if tied else Linear.take(weights, "lm_head", bias=False)
        return cls(config, embed, layers, norm, head)

    def __call__(self, batch: Batch, kv: KVCache) -> mx.array:
        x, residual = self.embed_tokens(batch.tokens), None
        for layer in self.layers:
            x, residual = layer(x, residual, batch, kv)
        if residual is not None:
            x = x + residual
        # The head is the widest map of all: only rows whose logits are wanted pay for it.
        return self.lm_head(self.norm(x[batch.logit_rows]))
