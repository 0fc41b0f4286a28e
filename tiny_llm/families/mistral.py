"""Mistral: LLaMA without biases, and with a window in its first version."""

from __future__ import annotations

from tiny_llm.families.family import Family, defaults

MISTRAL = Family(
    defaults(32_000, 14_336, 131_072, num_key_value_heads=8, sliding_window=4_096),
    facts={"attention_bias": False, "output_bias": False, "mlp_bias": False},
)
