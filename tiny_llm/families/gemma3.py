"""Gemma 3's text model: norms on both sides, local layers of an own RoPE, GELU, embeddings scaled."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tiny_llm.config_fields import Fields
from tiny_llm.families.family import DecoderSizes, Family, Places, Stored, defaults

_NORMS: Mapping[str, str] = {
    "input_layernorm": "input_layernorm",
    "self_attn.output_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp.output_norm": "post_feedforward_layernorm",
    "self_attn.q_norm": "self_attn.q_norm",
    "self_attn.k_norm": "self_attn.k_norm",
}


def _read(fields: Fields) -> Mapping[str, object]:
    if fields.text("hidden_activation") != "gelu_pytorch_tanh":
        raise fields.wrong("hidden_activation", "'gelu_pytorch_tanh'")
    layers, pattern = (
        fields.whole("num_hidden_layers", most=10_000),
        fields.whole("sliding_window_pattern", 6),
    )
    kinds = fields.get("layer_types")
    if not isinstance(kinds, list):
        kinds = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    facts: dict[str, object] = {
        "layer_types": kinds,
        "local_layers": tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention"),
        "local_theta": fields.number("rope_local_base_freq", 10_000.0),
        "embedding_scale": fields.whole("hidden_size") ** 0.5,
        "query_scale": (fields.whole("head_dim") / fields.number("query_pre_attn_scalar")) ** 0.5,
    }
    rope = fields.section("rope_parameters")  # as transformers 5 has it: one for each kind of layer
    if rope is not None and (local := rope.section("sliding_attention")) is not None:
        if local.text("rope_type", "default") != "default":
            raise local.wrong("rope_type", "'default'")
        facts["local_theta"] = local.number("rope_theta", 10_000.0)
        facts["rope_parameters"] = rope.get("full_attention")
    if fields.get("rope_theta") is None and rope is None:
        facts["rope_theta"] = 1_000_000.0
    return facts


def _stored(sizes: DecoderSizes, names: Collection[str]) -> Places:
    """Norms lie there less 1, so that training begins from 0."""
    layer = "model.layers.{}"
    places = {f"{layer}.{ours}": Stored((f"{layer}.{theirs}",), plus=1.0) for ours, theirs in _NORMS.items()}
    return {**places, "model.norm": Stored(plus=1.0)}


GEMMA3 = Family(
    defaults(
        262_208,
        9_216,
        131_072,
        hidden_size=2_304,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        sliding_window=4_096,
        query_pre_attn_scalar=256,
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
    ),
    facts={"norm_after": True, "wide_norm": True, "qk_norm": "head", "mlp": "geglu", "mlp_bias": False},
    read=_read,
    reads=("query_pre_attn_scalar", "rope_local_base_freq"),
    stored=_stored,
)
