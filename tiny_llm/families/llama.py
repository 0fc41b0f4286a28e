"""LLaMA and those that kept its name: the decoder as it is by default."""

from __future__ import annotations

from tiny_llm.families.family import Family, defaults

LLAMA = Family(defaults(32_000, 11_008, 2_048))
