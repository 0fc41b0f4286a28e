"""OLMo 2: norms behind attention and the MLP, not before; all queries normed as one vector, all keys too.

OLMoE: experts in every layer, and of those norms only the ones of queries and keys.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tiny_llm.config_fields import Fields
from tiny_llm.families.experts import every, expert_places
from tiny_llm.families.family import DecoderSizes, ExpertFacts, Family, Places, Stored, defaults


def _stored(sizes: DecoderSizes, names: Collection[str]) -> Places:
    layer = "model.layers.{}"
    return {
        f"{layer}.self_attn.output_norm": Stored((f"{layer}.post_attention_layernorm",)),
        f"{layer}.mlp.output_norm": Stored((f"{layer}.post_feedforward_layernorm",)),
    }


OLMO2 = Family(
    defaults(50_304, 11_008, 2_048, rms_norm_eps=1e-5),
    facts={
        "norm_before": False,
        "norm_after": True,
        "wide_norm": True,
        "qk_norm": "whole",
        "mlp_bias": False,
    },
    stored=_stored,
)


def _read(fields: Fields) -> Mapping[str, object]:
    count, width = fields.whole("num_experts"), fields.whole("intermediate_size")
    facts = ExpertFacts(
        count=count,
        per_token=fields.whole("num_experts_per_tok", most=count),
        width=width,
        layers=every(1, fields.whole("num_hidden_layers")),
        dense_width=width,
        normalised=fields.flag("norm_topk_prob", False),
    )
    return {"experts": facts, "intermediate_size": facts.active_width}


OLMOE = Family(
    defaults(
        50_304,
        2_048,
        4_096,
        hidden_size=2_048,
        num_hidden_layers=16,
        num_attention_heads=16,
        rms_norm_eps=1e-5,
        num_experts=64,
        num_experts_per_tok=8,
    ),
    facts={"qk_norm": "whole", "mlp_bias": False},
    read=_read,
    reads=("num_experts",),
    stored=expert_places,
)
