"""Owns which options of other architectures are known, and refused because they would change the result."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tiny_llm.errors import ConfigError

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
