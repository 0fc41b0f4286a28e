"""OLMo 2: norms behind attention and the MLP, not before; all queries normed as one vector, all keys too."""

from __future__ import annotations

from collections.abc import Collection

from tiny_llm.families.family import DecoderSizes, Family, Places, Stored, defaults


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
