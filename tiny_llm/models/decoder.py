"""The decoder of all families: one class, shaped by its config's facts.

Owns the wiring and the Hugging Face tensor names. Knows no cache, no checkpoint
file and no tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.data import Batch, KVCache
from tiny_llm.distributed.group import ALONE, Group
from tiny_llm.families.family import ExpertFacts
from tiny_llm.layers.attention import Attention, Rotation, rotations
from tiny_llm.layers.embedding import Embedding
from tiny_llm.layers.gathered import gathering
from tiny_llm.layers.linear import Linear
from tiny_llm.layers.mlp import MLP, Experts, GeluMLP
from tiny_llm.layers.named import Shapes, Weights, under
from tiny_llm.layers.norm import FinishedLinear, Norm, OutputMap, norm_shapes, take_norm
from tiny_llm.models.ranks import of_rank


def _experts_of(config: ModelConfig, layer: int) -> ExpertFacts | None:
    """The facts of a layer's experts, where it has some in the place of an MLP."""
    return config.experts if config.experts is not None and layer in config.experts.layers else None


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention, then MLP or experts, each on the normed input and added to it (pre-norm residual).

    What is to be added waits for the norm that reads the sum next, so that one kernel does both.
    """

    input_layernorm: Norm
    self_attn: Attention
    post_attention_layernorm: Norm
    mlp: MLP | GeluMLP | Experts

    @staticmethod
    def shapes(config: ModelConfig, layer: int = 0) -> Shapes:
        """The tensors that ``take`` reads, without their prefix."""
        norm = norm_shapes(config) if config.norm_before else {}
        facts = _experts_of(config, layer)
        return {
            **under("input_layernorm", norm),
            **under("self_attn", Attention.shapes(config)),
            **under("post_attention_layernorm", norm),
            **under("mlp", MLP.shapes(config) if facts is None else Experts.shapes(config, facts)),
        }

    @classmethod
    def take(
        cls, weights: Weights, config: ModelConfig, layer: int, rotation: Rotation, group: Group = ALONE
    ) -> DecoderLayer:
        """Pick layer ``layer``'s tensors. Raises WeightError for one that is missing."""
        prefix = f"model.layers.{layer}"
        norms = [
            take_norm(weights, f"{prefix}.{name}", config) if config.norm_before else Norm()
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        attention = Attention.take(weights, f"{prefix}.self_attn", config, layer, *rotation, group)
        mlp, facts = (weights, f"{prefix}.mlp", config), _experts_of(config, layer)
        taken = MLP.take(*mlp, group) if facts is None else Experts.take(*mlp, facts, group)
        return cls(norms[0], attention, norms[1], taken)

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
    norm: Norm
    lm_head: OutputMap
    group: Group = ALONE

    @property
    def inv_freq(self) -> list[mx.array] | None:
        """By what each layer's keys are turned a position, [D/2]; None where they cannot be (GPT-2)."""
        turned = [layer.self_attn.inv_freq for layer in self.layers]
        return None if self.config.learned_positions else [one for one in turned if one is not None]

    @staticmethod
    def shapes(config: ModelConfig) -> Shapes:
        """Every tensor of a checkpoint by its Hugging Face name, in its unquantized shape."""
        V, E = config.vocab_size, config.hidden_size
        shapes = Embedding.shapes(config)
        for layer in range(config.num_layers):
            shapes |= under(f"model.layers.{layer}", DecoderLayer.shapes(config, layer))
        shapes |= under("model.norm", norm_shapes(config))
        return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": (V, E)}

    @classmethod
    def take(cls, config: ModelConfig, weights: Weights, group: Group = ALONE) -> Decoder:
        """Pick the tensors that ``shapes`` names, or a rank's part of them; its config has the rank's heads.

        Raises WeightError for one that is missing.
        """
        embed = Embedding.take(weights, config, group)
        turns = enumerate(rotations(config))
        layers = tuple(DecoderLayer.take(weights, config, i, rotation, group) for i, rotation in turns)
        return cls(
            of_rank(config, group.size), embed, layers, *cls.take_head(config, weights, embed, group), group
        )

    @staticmethod
    def take_head(
        config: ModelConfig, weights: Weights, embed: Embedding, group: Group
    ) -> tuple[Norm, OutputMap]:
        """The last norm, and the map to logits."""
        norm = take_norm(weights, "model.norm", config)
        tied = config.tie_word_embeddings or "lm_head.weight" not in weights  # else it was saved without one
        own = embed.as_head() if tied else Linear.take(weights, "lm_head", bias=False)
        head, scale = gathering(own, group, config.vocab_size), config.logit_scale
        return norm, head if scale == 1 else FinishedLinear(head, None, scale)

    @property
    def has_head(self) -> bool:
        """Whether it was saved with a head, its own or the table of tokens: else it can only embed."""
        head = self.lm_head.linear if isinstance(self.lm_head, FinishedLinear) else self.lm_head
        is_table = isinstance(head, Linear) and head.weight is self.embed_tokens.weight
        return self.config.tie_word_embeddings or not is_table

    def with_hidden(self, batch: Batch, kv: KVCache, rows: mx.array) -> tuple[mx.array, mx.array]:
        """The batch's logits [R, V], and what the head would read of other ``rows`` int32 [P]: [P, E]."""
        wanted, hidden = batch.logit_rows.size, list[mx.array]()

        def head(x: mx.array) -> mx.array:
            hidden.append(x[wanted:])
            return self.lm_head(x[:wanted])

        both = replace(batch, logit_rows=mx.concatenate([batch.logit_rows, rows]))
        return replace(self, lm_head=head)(both, kv), hidden[0]

    def __call__(self, batch: Batch, kv: KVCache) -> mx.array:
        x, residual = self.embed_tokens(batch.tokens, batch.positions), None
        for layer in self.layers:
            x, residual = layer(x, residual, batch, kv)
        if residual is not None:
            x = x + residual
        # The head is the widest map of all: only rows whose logits are wanted pay for it.
        return self.lm_head(self.norm(x[batch.logit_rows]))
