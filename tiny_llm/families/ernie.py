"""ERNIE 4.5: LLaMA with one switch for all biases, whose RoPE turns neighbours. Elsewhere it turns halves.

Its mixtures: first layers dense, a correction for choosing experts, some that all tokens share.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tiny_llm.config_fields import Fields
from tiny_llm.families.experts import MLP, every, expert_places
from tiny_llm.families.family import DecoderSizes, ExpertFacts, Family, Places, Stored


def _read(fields: Fields) -> Mapping[str, object]:
    return dict.fromkeys(("attention_bias", "mlp_bias"), fields.flag("use_bias", False))


ERNIE4_5 = Family(
    {
        "vocab_size": 103_424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    },
    facts={"rope_interleaved": True},
    read=_read,
)


def _read_experts(fields: Fields) -> Mapping[str, object]:
    for name, only in (("use_bias", False), ("moe_gate_act", "softmax"), ("moe_norm_min", 1e-12)):
        if fields.get(name) not in (None, only):
            raise fields.wrong(name, repr(only))
    layers, count = fields.whole("num_hidden_layers"), fields.whole("moe_num_experts")
    step, first = fields.whole("moe_layer_interval", 1), fields.whole("moe_layer_start_index", least=0)
    last, width = fields.whole("moe_layer_end_index", -1, least=-1), fields.whole("moe_intermediate_size")
    facts = ExpertFacts(
        count=count,
        per_token=fields.whole("moe_k", most=count),
        width=width,
        layers=every(step, layers, first, last % layers),
        dense_width=fields.whole("intermediate_size"),
        normalised=True,
        corrected=fields.flag("moe_use_aux_free", True),
        shared_width=width * fields.whole("moe_num_shared_experts", 0, least=0),
    )
    return {"experts": facts, "intermediate_size": facts.active_width}


def _stored(sizes: DecoderSizes, names: Collection[str]) -> Places:
    parts = ("gate_proj", "up_proj", "down_proj")
    shared = {f"{MLP}.shared_expert.{part}": Stored((f"{MLP}.shared_experts.{part}",)) for part in parts}
    return {**expert_places(sizes, names), **shared, f"{MLP}.moe_statics": Stored(flat=True)}


ERNIE4_5_MOE = replace(
    ERNIE4_5,
    defaults={
        **ERNIE4_5.defaults,
        **{"hidden_size": 2560, "intermediate_size": 12_288, "num_hidden_layers": 28, "head_dim": None},
        **{"num_attention_heads": 20, "num_key_value_heads": 4, "moe_layer_start_index": 1},
        **{"moe_num_experts": 64, "moe_k": 6, "moe_intermediate_size": 1536, "moe_num_shared_experts": 2},
    },
    read=_read_experts,
    stored=_stored,
    unread=("model.mtp_",),  # what guesses further tokens
)
