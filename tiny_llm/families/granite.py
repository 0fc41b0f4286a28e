"""Granite: LLaMA with four numbers more, by which embeddings, queries, results and logits are scaled."""

from __future__ import annotations

from collections.abc import Mapping

from tiny_llm.config_fields import Fields
from tiny_llm.families.family import Family, defaults


def _read(fields: Fields) -> Mapping[str, object]:
    heads = fields.whole("num_attention_heads")
    head_dim = fields.whole("head_dim", fields.whole("hidden_size") // heads)
    return {
        "embedding_scale": fields.number("embedding_multiplier", 1.0),
        "query_scale": fields.number("attention_multiplier", 1.0) * head_dim**0.5,
        "residual_scale": fields.number("residual_multiplier", 1.0),
        "logit_scale": 1 / fields.number("logits_scaling", 1.0),
    }


GRANITE = Family(
    defaults(32_000, 11_008, 2_048),
    read=_read,
    reads=("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
)
