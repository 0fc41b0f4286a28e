"""Owns which families come with us, by the ``model_type`` of their config.json.

And which options of other architectures are known, and refused because they would change the result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

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


# Fields of other architectures that change the result, with the values that switch
# each one off. Absent and null are always off.
_RESULT_CHANGING: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "attn_temperature_tuning": (False, 0),
    "clip_qkv": (),
    "dual_chunk_attention_config": ({},),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_causal": (True,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "n_routed_experts": (0,),
    "no_rope_layer_interval": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1,),
    "pruned_heads": ({}, []),
    "quantize_activations": (False,),
    "qkv_bias": (True,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "rope_traditional": (False,),
    "rotary_pct": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}


def refuse_unsupported(raw: Mapping[str, object], reads: Collection[str] = ()) -> None:
    """Raise ConfigError for an option that the decoder does not have and that changes its result.

    ``reads`` are those that its family knows.
    """
    for name, off in _RESULT_CHANGING.items():
        value = raw.get(name)
        if name not in reads and value is not None and value not in off:
            raise ConfigError(
                f"{name} is {value!r}: it changes the model's result and is not supported. "
                "Use a checkpoint without it."
            )
    if "hidden_act" not in reads and raw.get("hidden_act") not in ("silu", "swish", None):
        raise ConfigError(f"hidden_act is {raw['hidden_act']!r}, expected 'silu'.")
