"""A decoder as a pipeline: each rank has some layers, and hidden states go from one to the next.

The last rank looks tokens up and has the first layers; rank 0, which draws, has the last ones and the head.
So only hidden states travel, one way. Refuses to know who runs when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from tiny_llm.config import ModelConfig, ModelFacts
from tiny_llm.data import Batch, KVCache, Matrix, QuantizedTensor
from tiny_llm.distributed.group import ALONE, Group
from tiny_llm.errors import ConfigError
from tiny_llm.layers.attention import rotations
from tiny_llm.layers.embedding import Embedding
from tiny_llm.layers.named import Shapes, Weights, matrix
from tiny_llm.layers.norm import Norm
from tiny_llm.models.cost import matrix_flops
from tiny_llm.models.decoder import Decoder, DecoderLayer


def stage_layers(config: ModelFacts, shares: Sequence[float]) -> list[range]:
    """Each rank's layers, cut so that the work of a token that is drawn is as ``shares``, the head included.

    Raises ConfigError for shares that cannot be, or more ranks than layers.
    """
    L, size = config.num_layers, len(shares)
    if size > L or not all(0 < share < 1e6 for share in shares):
        told = ",".join(f"{share:g}" for share in shares)
        raise ConfigError(
            f"shares (--shares) are {told}, expected a number above 0 for each rank, and no more ranks than "
            f"the model has layers, {L}."
        )
    whole, head = matrix_flops(config, 1, 1), matrix_flops(config, 0, 1)
    layer, layers, end, share = (whole - head) / L, list[range](), L, 0.0
    for rank in range(size):
        share += shares[rank] / sum(shares)
        start = L - round((whole * share - head) / layer)
        start = max(size - 1 - rank, min(start, end - 1))  # one for each at least
        layers.append(range(start, end))
        end = start
    return layers


def stage_parts(
    config: ModelConfig, shapes: Shapes, rank: int, layers: Sequence[range]
) -> Mapping[str, range]:
    """An empty range for each tensor of ``shapes`` that this rank has no part of; others it has whole."""
    own = tuple(f"model.layers.{layer}." for layer in layers[rank])
    if rank == len(layers) - 1:
        own += ("model.embed_",)
    if rank == 0:
        own += ("model.norm.", "lm_head.", *(["model.embed_tokens."] if config.tie_word_embeddings else []))
    return {name: range(0) for name in shapes if not name.startswith(own)}


@dataclass(frozen=True, slots=True)
class Received(Embedding):
    """In the place of an embedding: what the rank before sends of the batch's tokens, [T, E] of ``dtype``."""

    width: int = 0
    dtype: mx.Dtype = mx.float32

    def __call__(self, tokens: mx.array, positions: mx.array | None = None) -> mx.array:
        return self.group.receive((tokens.size, self.width), self.dtype, self.group.rank + 1)


@dataclass(frozen=True, slots=True)
class Stage:
    """The layers of a rank that is not the first: a Model, whose logits nobody looks at."""

    config: ModelConfig
    decoder: Decoder
    dtype: mx.Dtype
    group: Group

    @property
    def inv_freq(self) -> list[mx.array] | None:
        """As the decoder's."""
        return self.decoder.inv_freq

    def __call__(self, batch: Batch, kv: KVCache) -> mx.array:
        x = self.decoder(replace(batch, logit_rows=mx.arange(batch.tokens.size)), kv)
        assert x.dtype == self.dtype, f"hidden states are {x.dtype}, the next rank expects {self.dtype}"
        sent = self.group.send(x, self.group.rank - 1)
        nothing = mx.broadcast_to(mx.zeros((1, 1), x.dtype), (batch.logit_rows.size, self.config.vocab_size))
        after: mx.array = mx.depends(nothing, sent)
        return after


def take_stage(config: ModelConfig, weights: Weights, group: Group, layers: range) -> Decoder | Stage:
    """Rank ``group.rank``'s layers of a decoder, of the tensors that ``stage_parts`` leaves it.

    Raises WeightError for one that is missing.
    """
    turns, taken = rotations(config), list[DecoderLayer]()
    for number, layer in enumerate(layers):
        one = DecoderLayer.take(weights, config, layer, turns[layer])
        taken.append(replace(one, self_attn=replace(one.self_attn, layer=number)))  # in the rank's own cache
    dtype = _computed_in(matrix(weights, f"model.layers.{layers[0]}.self_attn.q_proj.weight"))
    embed = Embedding.take(weights, config) if group.rank == group.size - 1 else None
    own = replace(config, num_layers=len(layers))
    if group.rank == 0:
        table = weights.get("model.embed_tokens.weight", mx.zeros((0, config.hidden_size)))
        embed = Received(table, group=group, width=config.hidden_size, dtype=dtype)
        norm, head = Decoder.take_head(config, weights, embed, ALONE)
        return Decoder(own, embed, tuple(taken), norm, head, group)
    if embed is None:
        embed = Received(mx.zeros((0, 0)), group=group, width=config.hidden_size, dtype=dtype)
    return Stage(own, Decoder(own, embed, tuple(taken), Norm(), lambda x: x, group), dtype, group)


def _computed_in(weight: Matrix) -> mx.Dtype:
    """The dtype of what a map by this matrix gives; our own kernels give float32."""
    if isinstance(weight, QuantizedTensor):
        return weight.scales.dtype
    return weight.dtype if isinstance(weight, mx.array) else mx.float32
