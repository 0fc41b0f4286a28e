"""Make tests/golden/config_defaults.json: what transformers reads where config.json leaves a field out.

Needs transformers 5 (no torch), in an environment of its own; the tests need neither. Run it again after
adding a family or a field, from the repository's root:

    python tools/make_defaults.py          # or: python tools/make_defaults.py --out other.json

For each family and each of its ``bases``: the config.json, what its class makes of it (``facts``), and what
changes without one field, without all of them, and with null in a field; {"refused": ...} where it raises.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import transformers

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "num_key_value_heads": 16,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": True,
    "eos_token_id": 7,
}
"""No field has its default, so that leaving one out shows."""
HEAD = {"head_dim": 16}
BIASED = {"attention_bias": True}
SWITCHED = {"use_sliding_window": True, "sliding_window": 1024}
MIXED = {"num_experts": 12, "num_experts_per_tok": 3, "norm_topk_prob": True}
SPARSE = MIXED | {"moe_intermediate_size": 48}
GPT2 = {
    "vocab_size": 1000,
    "n_embd": 576,
    "n_layer": 2,
    "n_head": 48,
    "n_positions": 8192,
    "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 7,
}
SCALES = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
BASES = {
    "gpt2": [GPT2],
    "ernie4_5": [SIZES | HEAD | {"use_bias": True}],
    "ernie4_5_moe": [
        SIZES
        | {"hidden_size": 640, "num_attention_heads": 40, "num_key_value_heads": 10}
        | {"moe_num_experts": 12, "moe_k": 3, "moe_intermediate_size": 48}
    ],
    "gemma3_text": [
        SIZES
        | HEAD
        | {"num_attention_heads": 16, "num_key_value_heads": 2, "sliding_window": 1024}
        | {"rope_local_base_freq": 5000.0, "query_pre_attn_scalar": 64}
    ],
    "granite": [SIZES | BIASED | dict.fromkeys(SCALES, 0.5)],
    "olmo2": [SIZES | BIASED],
    "phi3": [SIZES | {"sliding_window": 1024, "partial_rotary_factor": 0.5}],
    "smollm3": [SIZES | BIASED | {"mlp_bias": True, "no_rope_layer_interval": 2}],
    "llama": [SIZES | HEAD | BIASED | {"mlp_bias": True}],
    "mistral": [SIZES | HEAD | {"sliding_window": None}, SIZES | {"sliding_window": 1024}],
    "qwen2": [SIZES | SWITCHED | {"max_window_layers": layers} for layers in (1, 2)],
    "qwen3": [SIZES | HEAD | BIASED | SWITCHED | {"max_window_layers": layers} for layers in (1, 2)],
    "qwen2_moe": [SIZES | SPARSE],
    "qwen3_moe": [SIZES | BIASED | SPARSE],
    "olmoe": [SIZES | BIASED | MIXED],
}
KEPT = (*SIZES, *SPARSE, *SCALES, "head_dim", "attention_bias", "mlp_bias", "no_rope_layers")


def facts(model_type: str, fields: dict[str, object]) -> dict[str, object]:
    """What the class of ``model_type`` makes of a config.json; ``window`` is that of a layer that has one."""
    try:
        config = transformers.AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # whatever it is, the file cannot be used there
        return {"refused": type(error).__name__}
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": 10_000.0, "rope_type": "default"}
    found = {name: getattr(config, name) for name in KEPT if name != "rope_theta" and hasattr(config, name)}
    if hasattr(config, "layer_norm_epsilon"):
        found["rms_norm_eps"] = config.layer_norm_epsilon
    if "full_attention" in rope:
        found["local_theta"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if hasattr(config, "query_pre_attn_scalar"):
        found["attention_multiplier"] = config.query_pre_attn_scalar**-0.5
    if hasattr(config, "use_bias"):
        found |= dict.fromkeys(("attention_bias", "mlp_bias"), bool(config.use_bias))
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    window = getattr(config, "sliding_window", None) if slides else None
    share = rope.get("partial_rotary_factor") or 1.0
    if share != 1 or "partial_rotary_factor" in rope:
        found["rotary_dim"] = (
            int(share * (config.hidden_size // config.num_attention_heads)) if share != 1 else 0
        )
    if kinds is not None and slides and window is None:
        return {"refused": "there is no window"}
    return found | {"rope_theta": rope["rope_theta"], "rope_type": rope["rope_type"], "window": window}


def differences(before: dict[str, object], after: dict[str, object]) -> dict[str, object]:
    """The facts that are others now."""
    return {name: value for name, value in after.items() if name not in before or before[name] != value}


def readings(model_type: str, base: dict[str, object]) -> dict[str, object]:
    """One entry of the file."""
    whole = facts(model_type, base)
    without = {name: {k: v for k, v in base.items() if k != name} for name in base}
    nulls = {name: base | {name: None} for name in base}
    return {
        "config": {"model_type": model_type} | base,
        "facts": whole,
        "without": {name: differences(whole, facts(model_type, rest)) for name, rest in without.items()},
        "without_all": differences(whole, facts(model_type, {})),
        "null": {name: differences(whole, facts(model_type, given)) for name, given in nulls.items()},
    }


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/golden/config_defaults.json"))
    out = parser.parse_args().out
    read = [readings(model_type, base) for model_type, bases in BASES.items() for base in bases]
    told = {"transformers": transformers.__version__, "bases": read}
    out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: {len(read)} configs, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
