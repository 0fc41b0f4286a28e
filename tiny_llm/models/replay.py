"""Owns a decoder's step whose graph is built once for such shapes, then played again.

To build it anew takes Python longer than a small model's step takes a GPU, and on a CPU a quarter of the time
that the kernels take on the same cores. But only a batch's and the cache's arrays are others.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.data import Batch, KVCache
from tiny_llm.kv.paged import PagedCache
from tiny_llm.models.decoder import Decoder, DecoderLayer
from tiny_llm.models.registry import Model
from tiny_llm.ops.backend import active, cpu, on_mlx

MOST_TOKENS = 64
"""Of a step that is played again: each number of them is kept, and a larger step keeps a processor busy."""
MOST_KEPT = 32  # chains: one for each number of tokens, sequences, rows and blocks


def played(model: Model) -> Model:
    """``model``, or what plays it again, for the backend in use where this is called."""
    on_gpu = mx.default_device().type == mx.gpu and on_mlx() and active() != "metalsim"
    if not isinstance(model, Decoder) or model.group.size > 1:  # what waits for others is not kept
        return model
    return Replay(model) if on_gpu else Chained(model) if active() == "cpu" else model


class Played:
    """A ``Decoder`` for one backend and its choice of kernels, which are kept with the graph."""

    def __init__(self, model: Decoder) -> None:
        self.config: ModelConfig = model.config
        self.model = model
        self.inv_freq = model.inv_freq

    def __call__(self, batch: Batch, kv: KVCache) -> mx.array:
        """Logits [R, V], as the model gives them."""
        return (self.again if 0 < batch.tokens.size <= MOST_TOKENS else self.model)(batch, kv)

    def again(self, batch: Batch, kv: KVCache) -> mx.array:
        """The same by the graph that is kept, or will be."""
        raise NotImplementedError


class Chained(Played):
    """On the CPU kernels, all of a step. Kernels in a row are one operation."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self._chains: dict[tuple[object, ...], cpu.Chain] = {}
        self._stream = mx.default_stream(mx.cpu)  # theirs: MLX's streams belong to a thread
        self._can = True  # as far as is known

    def again(self, batch: Batch, kv: KVCache) -> mx.array:
        """By the chain for the batch's sizes."""
        pages = batch.pages
        if not self._can or pages is None or not isinstance(kv, PagedCache):
            return self.model(batch, kv)
        if self._stream != (stream := mx.default_stream(mx.cpu)):
            self._stream, self._chains = stream, {}
        pools = kv.arrays()
        inputs = [batch.tokens, batch.positions, batch.logit_rows, *pages, *pools]
        sizes = batch.tokens.size, batch.logit_rows.size, pages.block_tables.shape
        key = (*sizes, pools[0].shape, pools[0].dtype)
        chain = self._chains.get(key)
        if chain is None:
            logits = self.model(batch, kv)
            try:
                chain = cpu.Chain(inputs, [logits, *kv.arrays()])
            except ValueError:  # something was looked at while the graph was built, and is not in it
                self._can = False
                return logits
            if len(self._chains) == MOST_KEPT:
                del self._chains[next(iter(self._chains))]
            self._chains[key] = chain
        logits, *pools = chain(inputs)
        kv.put(pools)
        return logits


class Replay(Played):
    """By ``mx.compile``, what lies between one layer's attention and the next.

    Only attention depends on more than the shapes of its arrays.
    """

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self._begin = mx.compile(partial(_begin, model))
        self._between = [mx.compile(partial(_between, *pair)) for pair in pairwise(model.layers)]
        self._end = mx.compile(partial(_end, model))

    def again(self, batch: Batch, kv: KVCache) -> mx.array:
        """Layer by layer."""
        if not self._between:
            return self.model(batch, kv)
        attentions = [layer.self_attn for layer in self.model.layers]
        x, q, k, v = self._begin(batch.tokens, batch.positions)
        for layer, between in enumerate(self._between):
            x, q, k, v = between(x, attentions[layer].attend(q, k, v, batch, kv), batch.positions)
        return self._end(x, attentions[-1].attend(q, k, v, batch, kv), batch.logit_rows)


def _begin(model: Decoder, tokens: mx.array, positions: mx.array) -> tuple[mx.array, ...]:
    """The first layer's x and, for its attention, q, k and v."""
    x, normed = model.layers[0].input_layernorm.after(model.embed_tokens(tokens, positions), None)
    return x, *model.layers[0].self_attn.heads(normed, positions)


def _between(
    layer: DecoderLayer, following: DecoderLayer, x: mx.array, attended: mx.array, positions: mx.array
) -> tuple[mx.array, ...]:
    """From what ``layer`` attended to: the same for the layer that follows."""
    x, normed = layer.post_attention_layernorm.after(x, layer.self_attn.o_proj(attended))
    x, normed = following.input_layernorm.after(x, layer.mlp(normed))
    return x, *following.self_attn.heads(normed, positions)


def _end(model: Decoder, x: mx.array, attended: mx.array, logit_rows: mx.array) -> mx.array:
    """From what the last layer attended to: logits."""
    layer = model.layers[-1]
    x, normed = layer.post_attention_layernorm.after(x, layer.self_attn.o_proj(attended))
    x = x + layer.mlp(normed)
    return model.lm_head(model.norm(x[logit_rows]))
