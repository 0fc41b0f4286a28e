"""Qwen2 has biases on queries, keys and values; Qwen3 a norm of each head in their place."""

from __future__ import annotations

from collections.abc import Mapping

from tiny_llm.families.family import Family, defaults

_QWEN2 = defaults(151_936, 22_016, 32_768, num_key_value_heads=32, sliding_window=4_096, max_window_layers=28)
_QWEN3: Mapping[str, object] = {**_QWEN2, "head_dim": 128}

QWEN2 = Family(
    _QWEN2,
    facts={"attention_bias": True, "output_bias": False, "mlp_bias": False},
    window_needs_switch=True,
)
QWEN3 = Family(_QWEN3, facts={"mlp_bias": False, "qk_norm": "head"}, window_needs_switch=True)
