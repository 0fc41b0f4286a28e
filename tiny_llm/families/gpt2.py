"""GPT-2: learned places, LayerNorm, biases everywhere, and matrices that lie transposed, three in one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tiny_llm.config_fields import Fields
from tiny_llm.families.family import DecoderSizes, Family, Places, Stored, fused


def _read(fields: Fields) -> Mapping[str, object]:
    for name, on in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if fields.flag(name, on) is not on:
            raise fields.wrong(name, str(on).lower())
    if fields.text("activation_function") not in ("gelu_new", "gelu_pytorch_tanh"):
        raise fields.wrong("activation_function", "'gelu_new'")
    return {"intermediate_size": fields.whole("n_inner", 4 * fields.whole("n_embd"))}


def _stored(sizes: DecoderSizes, names: Collection[str]) -> Places:
    """Of the three prefixes that there are, "model." is mlx-lm's, who turns matrices round."""
    prefix = next((p for p in ("transformer.", "model.") if f"{p}wte.weight" in names), "")
    transposed, E = prefix != "model.", sizes.hidden_size
    ours, theirs = "model.layers.{}", f"{prefix}h.{{}}"
    modules = {
        "model.embed_tokens": Stored((f"{prefix}wte",)),
        "model.embed_positions": Stored((f"{prefix}wpe",)),
        "model.norm": Stored((f"{prefix}ln_f",)),
        f"{ours}.input_layernorm": Stored((f"{theirs}.ln_1",)),
        f"{ours}.post_attention_layernorm": Stored((f"{theirs}.ln_2",)),
        f"{ours}.self_attn.o_proj": Stored((f"{theirs}.attn.c_proj",), transposed),
        f"{ours}.mlp.up_proj": Stored((f"{theirs}.mlp.c_fc",), transposed),
        f"{ours}.mlp.down_proj": Stored((f"{theirs}.mlp.c_proj",), transposed),
    }
    heads = [(f"{ours}.self_attn.{part}_proj", E) for part in "qkv"]
    return {**modules, **fused(f"{theirs}.attn.c_attn", heads, transposed=transposed)}


GPT2 = Family(
    {
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    names={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    facts={
        "norm": "layer",
        "mlp": "gelu",
        "learned_positions": True,
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    },
    read=_read,
    stored=_stored,
    unread=(".attn.bias", ".attn.masked_bias"),
)
