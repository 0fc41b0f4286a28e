"""The families of decoders that config.json can name: what each fixes, and what it fills in.

Owns which options of other architectures are known, and refused because they would change the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tiny_llm.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True)
class Family:
    """What a ``model_type`` fixes by itself. None leaves the fact to config.json.

    ``defaults`` are the fields of a config.json that does not mention them, as transformers' class for
    the family has them: what a checkpoint leaves out is what its author's tool would fill in. All but
    ``eos_token_id``: other files name it too, and theirs for LLaMA, 2, is "#" in the vocabulary of LLaMA 3.
    """

    attention_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    window_needs_switch: bool = False  # a window counts only with use_sliding_window
    defaults: Mapping[str, object] = field(default_factory=dict)


def _defaults(vocab: int, intermediate: int, positions: int, **more: object) -> Mapping[str, object]:
    """The defaults in which families differ, and what they have in common."""
    common = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    sizes = {"vocab_size": vocab, "intermediate_size": intermediate, "max_position_embeddings": positions}
    return {**common, **sizes, **more}


_LLAMA = _defaults(32_000, 11_008, 2_048)
_MISTRAL = _defaults(32_000, 14_336, 131_072, num_key_value_heads=8, sliding_window=4_096)
_QWEN2 = _defaults(
    151_936, 22_016, 32_768, num_key_value_heads=32, sliding_window=4_096, max_window_layers=28
)
_QWEN3: Mapping[str, object] = {**_QWEN2, "head_dim": 128}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(defaults=_LLAMA),
    "mistral": Family(attention_bias=False, output_bias=False, mlp_bias=False, defaults=_MISTRAL),
    "qwen2": Family(
        attention_bias=True,
        output_bias=False,
        mlp_bias=False,
        window_needs_switch=True,
        defaults=_QWEN2,
    ),
    "qwen3": Family(mlp_bias=False, qk_norm=True, window_needs_switch=True, defaults=_QWEN3),
}


def built_in_family(model_type: str) -> Family:
    """Return the family of ``model_type``. Raises ConfigError, with near names, for one that is unknown."""
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type is {model_type!r}, expected one of {', '.join(FAMILIES)}, "
            f"or one that an installed plug-in adds.{did_you_mean(model_type, FAMILIES)}"
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
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "rope_traditional": (False,),
    "rotary_pct": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}


def refuse_unsupported(raw: Mapping[str, object]) -> None:
    """Raise ConfigError for an option that the decoder does not have and that changes its result."""
    for name, off in _RESULT_CHANGING.items():
        value = raw.get(name)
        if value is not None and value not in off:
            raise ConfigError(
                f"{name} is {value!r}: it changes the model's result and is not supported. "
                "Use a checkpoint without it."
            )
    if raw.get("hidden_act", "silu") not in ("silu", "swish", None):
        raise ConfigError(f"hidden_act is {raw['hidden_act']!r}, expected 'silu'.")
