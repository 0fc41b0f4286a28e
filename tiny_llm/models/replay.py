"""Owns a decoder's graph from one layer's attention to the next: built once, then played again by MLX.

To build a step's graph anew takes Python longer than a small model's step takes a GPU. Only attention depends
on more than the shapes of its arrays; ``mx.compile`` keeps what lies between.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.data import Batch, KVCache
from tiny_llm.models.chained import Chained
from tiny_llm.models.decoder import Decoder, DecoderLayer
from tiny_llm.models.registry import Model
from tiny_llm.ops.backend import active, on_mlx

MOST_TOKENS = 64
"""Of a step that is played again: each number of them is kept, and a larger step keeps a GPU busy anyway."""


def played(model: Model) -> Model:
    """``model``, or what plays it again, for the backend in use where this is called."""
    on_gpu = mx.default_device().type == mx.gpu and on_mlx() and active() != "metalsim"
    if not isinstance(model, Decoder) or model.group.size > 1:  # what waits for others is not kept
        return model
    return Replay(model) if on_gpu else Chained(model) if active() == "cpu" else model


class Replay:
    """A ``Decoder`` for one backend and its choice of kernels, which are kept with the graph."""

    def __init__(self, model: Decoder) -> None:
        layers = model.layers
        self.config: ModelConfig = model.config
        self.model = model
        self._begin = mx.compile(partial(_begin, model))
        self._between = [mx.compile(partial(_between, *pair)) for pair in pairwise(layers)]
        self._end = mx.compile(partial(_end, model))

    def __call__(self, batch: Batch, kv: KVCache) -> mx.array:
        """Logits [R, V], as the model gives them."""
        if not self._between or not 0 < batch.tokens.size <= MOST_TOKENS:
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
