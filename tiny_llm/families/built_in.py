"""Owns which families come with us, by the ``model_type`` of their config.json."""

from __future__ import annotations

from collections.abc import Mapping

from tiny_llm.errors import ConfigError, did_you_mean
from tiny_llm.families.ernie import ERNIE4_5, ERNIE4_5_MOE
from tiny_llm.families.family import Family
from tiny_llm.families.gemma3 import GEMMA3
from tiny_llm.families.gpt2 import GPT2
from tiny_llm.families.granite import GRANITE
from tiny_llm.families.llama import LLAMA, MISTRAL
from tiny_llm.families.olmo import OLMO2, OLMOE
from tiny_llm.families.phi3 import PHI3
from tiny_llm.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from tiny_llm.families.smollm3 import SMOLLM3

FAMILIES: Mapping[str, Family] = {
    "ernie4_5": ERNIE4_5,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "gemma3_text": GEMMA3,
    "gpt2": GPT2,
    "granite": GRANITE,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "olmo2": OLMO2,
    "phi3": PHI3,
    "olmoe": OLMOE,
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "smollm3": SMOLLM3,
}


def built_in_family(model_type: str) -> Family:
    """Return the family of ``model_type``. Raises ConfigError, with near names, for one that is unknown."""
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type is {model_type!r}, expected one of {', '.join(FAMILIES)}, "
            f"or one that a plug-in adds (--plugin, or installed).{did_you_mean(model_type, FAMILIES)}"
        )
    return FAMILIES[model_type]
