"""LLaMA and those that kept its name: the decoder as it is by default; Mistral's, without biases."""

from __future__ import annotations

from tiny_llm.families.family import Family, defaults

LLAMA = Family(defaults(32_000, 11_008, 2_048))
MISTRAL = Family(
    defaults(32_000, 14_336, 131_072, num_key_value_heads=8, sliding_window=4_096),
    facts={"attention_bias": False, "output_bias": False, "mlp_bias": False},
)
