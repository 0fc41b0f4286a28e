"""Qwen2 has biases on queries, keys and values; Qwen3 a norm of each head in their place.

Both with experts in most layers, too. Qwen2's have one more, which all tokens go through, each by a weight of
its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tiny_llm.config_fields import Fields
from tiny_llm.families.experts import every, expert_places
from tiny_llm.families.family import ExpertFacts, Family, defaults

_QWEN2 = defaults(151_936, 22_016, 32_768, num_key_value_heads=32, sliding_window=4_096, max_window_layers=28)
_QWEN3: Mapping[str, object] = {**_QWEN2, "head_dim": 128}

QWEN2 = Family(
    _QWEN2, facts={"attention_bias": True, "output_bias": False, "mlp_bias": False}, window_needs_switch=True
)
QWEN3 = Family(_QWEN3, facts={"mlp_bias": False, "qk_norm": "head"}, window_needs_switch=True)


def _read_experts(fields: Fields) -> Mapping[str, object]:
    if fields.flag("use_sliding_window", False):
        raise fields.wrong("use_sliding_window", "false: no published model of experts has windows")
    count = fields.whole("num_local_experts" if fields.get("num_local_experts") else "num_experts")
    layers = every(fields.whole("decoder_sparse_step"), fields.whole("num_hidden_layers"))
    shared = fields.whole("shared_expert_intermediate_size", 0, least=0)
    facts = ExpertFacts(
        count=count,
        per_token=fields.whole("num_experts_per_tok", most=count),
        width=fields.whole("moe_intermediate_size"),
        layers=layers.difference(fields.token_ids("mlp_only_layers")),
        dense_width=fields.whole("intermediate_size"),
        normalised=fields.flag("norm_topk_prob", False),
        shared_width=shared,
        shared_gated=shared > 0,
    )
    return {"experts": facts, "intermediate_size": facts.active_width}


def _with_experts(family: Family, sizes: tuple[int, int, int], **own: object) -> Family:
    heads, kv_heads, inner = sizes
    common = {"hidden_size": 2_048, "num_hidden_layers": 24, "decoder_sparse_step": 1}
    own = {**common, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **own}
    return replace(
        family,
        defaults=defaults(151_936, inner, 32_768, **own),
        read=_read_experts,
        reads=("num_experts", "num_local_experts"),
        stored=expert_places,
    )


QWEN2_MOE = _with_experts(
    QWEN2,
    (16, 16, 5_632),
    num_experts=60,
    num_experts_per_tok=4,
    moe_intermediate_size=1_408,
    shared_expert_intermediate_size=5_632,
)
QWEN3_MOE = _with_experts(
    QWEN3, (32, 4, 6_144), num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768
)
