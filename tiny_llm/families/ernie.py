"""ERNIE 4.5: LLaMA with one switch for all biases, whose RoPE turns neighbours. Elsewhere it turns halves."""

from __future__ import annotations

from collections.abc import Mapping

from tiny_llm.config_fields import Fields
from tiny_llm.families.family import Family


def _read(fields: Fields) -> Mapping[str, object]:
    return dict.fromkeys(("attention_bias", "mlp_bias"), fields.flag("use_bias", False))


ERNIE4_5 = Family(
    {
        "vocab_size": 103_424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    },
    facts={"rope_interleaved": True},
    read=_read,
)
