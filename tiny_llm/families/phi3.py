"""Phi-3, Phi-4-mini: q, k and v in one matrix, gate and up in another; a part of a head turned; longrope."""

from __future__ import annotations

from collections.abc import Collection

from tiny_llm.families.family import DecoderSizes, Family, Places, defaults, fused


def _stored(sizes: DecoderSizes, names: Collection[str]) -> Places:
    layer, D, F = "model.layers.{}", sizes.head_dim, sizes.intermediate_size
    rows = {"q": sizes.num_heads * D, "k": sizes.num_kv_heads * D, "v": sizes.num_kv_heads * D}
    heads = [(f"{layer}.self_attn.{part}_proj", count) for part, count in rows.items()]
    pair = [(f"{layer}.mlp.{part}_proj", F) for part in ("gate", "up")]
    return {**fused(f"{layer}.self_attn.qkv_proj", heads), **fused(f"{layer}.mlp.gate_up_proj", pair)}


PHI3 = Family(
    defaults(32_064, 8192, 4096, hidden_size=3072, rms_norm_eps=1e-5, original_max_position_embeddings=4096),
    facts={"attention_bias": False, "mlp_bias": False},
    reads=("partial_rotary_factor",),
    stored=_stored,
)
