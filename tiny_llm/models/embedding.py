"""What stands behind a decoder's logits: its hidden states, and whether it has a head of its own."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from tiny_llm.data import Batch, KVCache
from tiny_llm.errors import RequestError
from tiny_llm.layers.linear import Linear
from tiny_llm.layers.output import FinishedLinear
from tiny_llm.models.chained import Chained
from tiny_llm.models.decoder import Decoder
from tiny_llm.models.registry import Model
from tiny_llm.models.replay import Replay
from tiny_llm.sampling_params import PoolingParams, SamplingParams


def with_hidden(model: Model, batch: Batch, kv: KVCache, rows: mx.array) -> tuple[mx.array, mx.array]:
    """The batch's logits [R, V], and what the head would read of other ``rows`` int32 [P]: normed, [P, E]."""
    decoder = model.model if isinstance(model, (Chained, Replay)) else model
    assert isinstance(decoder, Decoder), "others are refused by LLM.check"
    wanted, hidden = batch.logit_rows.size, list[mx.array]()

    def head(x: mx.array) -> mx.array:
        hidden.append(x[wanted:])
        return decoder.lm_head(x[:wanted])

    both = replace(batch, logit_rows=mx.concatenate([batch.logit_rows, rows]))
    logits = replace(decoder, lm_head=head)(both, kv)
    return logits, hidden[0]


def require_able(model: Model, params: SamplingParams) -> None:
    """Raise RequestError for what a model cannot do."""
    is_decoder, is_pooled = isinstance(model, Decoder), isinstance(params, PoolingParams)
    if is_pooled and not is_decoder:
        raise RequestError("This model, a plug-in's, does not show the hidden states that embed a text.")
    if isinstance(model, Decoder) and not is_pooled and not _has_head(model):
        raise RequestError(
            "This model was saved without its head, so it cannot answer; it embeds texts: LLM.embed, "
            "/v1/embeddings, main.py embed."
        )


def _has_head(model: Decoder) -> bool:
    head = model.lm_head.linear if isinstance(model.lm_head, FinishedLinear) else model.lm_head
    is_table = isinstance(head, Linear) and head.weight is model.embed_tokens.weight
    return model.config.tie_word_embeddings or not is_table
