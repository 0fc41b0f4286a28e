"""What a GGUF file says of its model, in the words of config.json and of Hugging Face's tensor names.

Owns which architectures are read, their keys, and where their tensors lie. Knows no use of a fact.
Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names: gguf-py's tensor_mapping.py.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from tiny_llm.config import ModelFacts
from tiny_llm.config_fields import Fields
from tiny_llm.errors import ConfigError, did_you_mean
from tiny_llm.families.built_in import built_in_family
from tiny_llm.families.family import AS_WANTED, Places, Stored, fused, in_order
from tiny_llm.weights import shards
from tiny_llm.weights.gguf.blocks import BITS, GROUP
from tiny_llm.weights.gguf.header import GGUF, GgufHeader, read_gguf
from tiny_llm.weights.header import StoredTensor

_T = TypeVar("_T")


class _Kind(NamedTuple):
    """An architecture: config.json's word for it, what no key says, and whether q and k lie for a RoPE of
    neighbours where Hugging Face has them for halves.
    """

    model_type: str
    facts: Mapping[str, object] = {}
    neighbours: bool = False
    epsilon: str = "attention.layer_norm_rms_epsilon"


_KINDS: Mapping[str, _Kind] = {
    "ernie4_5": _Kind("ernie4_5"),
    "gemma3": _Kind("gemma3_text", {"attention_multiplier": None}),
    "gpt2": _Kind("gpt2", epsilon="attention.layer_norm_epsilon"),
    "granite": _Kind("granite", neighbours=True),
    "llama": _Kind("llama", neighbours=True),  # Mistral's, too
    "olmo2": _Kind("olmo2"),
    "olmoe": _Kind("olmoe", {"norm_topk_prob": False}),
    "phi3": _Kind("phi3"),
    "qwen2": _Kind("qwen2"),
    "qwen2moe": _Kind("qwen2_moe", {"norm_topk_prob": False}),
    "qwen3": _Kind("qwen3"),
    "qwen3moe": _Kind("qwen3_moe", {"norm_topk_prob": True}),
    "smollm3": _Kind("smollm3", neighbours=True),
}
_MODULES: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "position_embd": "model.embed_positions",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "post_attention_norm": "model.layers.{}.self_attn.output_norm",
    "post_ffw_norm": "model.layers.{}.mlp.output_norm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
    "ffn_gate_inp": "model.layers.{}.mlp.gate",
    "ffn_gate_exps": "model.layers.{}.mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "model.layers.{}.mlp.switch_mlp.up_proj",
    "ffn_down_exps": "model.layers.{}.mlp.switch_mlp.down_proj",
    "ffn_gate_inp_shexp": "model.layers.{}.mlp.shared_expert_gate",
    "ffn_gate_shexp": "model.layers.{}.mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "model.layers.{}.mlp.shared_expert.up_proj",
    "ffn_down_shexp": "model.layers.{}.mlp.shared_expert.down_proj",
}
_FACTORS, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
UNREAD = (_FACTORS, _LONG, _SHORT)  # by the model: they are facts


def read_facts(header: GgufHeader, read: Callable[[Mapping[str, object]], _T]) -> _T:
    """Return what ``read`` makes of a file's ``config_fields``. Raises ConfigError that names the file."""
    try:
        return read(config_fields(header))
    except ConfigError as error:
        raise ConfigError(f"{header.path}: {error}") from None


def config_fields(header: GgufHeader) -> dict[str, object]:
    """Return the fields of the config.json that the file was made from, as far as they matter here.

    Raises ConfigError for an architecture that is not read, and for a key that is missing or of a wrong type.
    """
    fields = Fields(header.metadata)
    name = fields.text("general.architecture")
    if name not in _KINDS:
        raise ConfigError(
            f"general.architecture is {name!r}, expected one of {', '.join(_KINDS)}."
            f"{did_you_mean(name, _KINDS)}"
        )
    if fields.whole("split.count", 1) > 1:
        raise ConfigError(
            "The model is split over several files, of which one is given. Join them by llama.cpp's "
            "`llama-gguf-split --merge`, or take a file that is whole."
        )
    own = Fields({key.removeprefix(f"{name}."): value for key, value in header.metadata.items()}, name)
    kind, tensors = _KINDS[name], header.tensors
    hidden, heads = own.whole("embedding_length"), own.whole("attention.head_count")
    head_dim = own.whole("attention.key_length", hidden // heads)
    if own.whole("attention.value_length", head_dim) != head_dim:
        raise own.wrong("attention.value_length", f"the size of a head, {head_dim}")
    read = {
        "vocab_size": tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else None,
        "hidden_size": hidden,
        "num_hidden_layers": own.whole("block_count"),
        "intermediate_size": own.whole("feed_forward_length"),
        "n_inner": own.whole("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": own.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": own.whole("context_length"),
        "rms_norm_eps": own.number(kind.epsilon),
        "original_max_position_embeddings": own.get("rope.scaling.original_context_length"),
        "rope_parameters": _rope(header, own, head_dim),
        "sliding_window": own.get("attention.sliding_window") or None,  # Phi-4's is 0
        "embedding_multiplier": own.get("embedding_scale"),
        "attention_multiplier": own.get("attention.scale"),
        "residual_multiplier": own.get("residual_scale"),
        "logits_scaling": own.get("logit_scale"),
        "clip_qkv": own.get("attention.clamp_kqv"),
        "final_logit_softcapping": own.get("final_logit_softcapping"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "use_bias": "blk.0.attn_q.bias" in tensors,
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "dtype": _dtype(header),
        "quantization": _quantization(header),
        **(_experts(header, own) if own.get("expert_count") else {}),
        **(_gemma3(own, head_dim) if name == "gemma3" else {}),
        **kind.facts,
    }
    names = built_in_family(kind.model_type).names
    return {
        "model_type": kind.model_type,
        **{names.get(field, field): value for field, value in read.items()},
    }


def places(header: GgufHeader, config: ModelFacts, of_family: Places) -> Places:
    """Where the file has what the model of this config wants. ``of_family``: where its folders have it."""
    name = str(header.metadata["general.architecture"])
    found = {name: Stored((_stored(module),)) for module, name in _MODULES.items()}
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if "blk.0.attn_qkv.weight" in header.tensors:
        rows = zip(("attn_q", "attn_k", "attn_v"), (queries, keys, keys), strict=True)
        found |= fused("blk.{}.attn_qkv", [(_MODULES[module], count) for module, count in rows])
    if name == "phi3":
        halves = [(_MODULES[module], config.intermediate_size) for module in ("ffn_gate", "ffn_up")]
        found |= fused("blk.{}.ffn_up", halves)
    neighbours = (*range(0, config.head_dim, 2), *range(1, config.head_dim, 2))
    order = of_family.get(_MODULES["attn_q"], AS_WANTED).order
    return in_order(found, neighbours if _KINDS[name].neighbours else order)


def stored_tensors(header: GgufHeader) -> dict[str, StoredTensor]:
    """The file's tensors. A matrix of one row, which may be stored as a vector, is one."""
    row = "ffn_gate_inp_shexp.weight"
    return {
        name: replace(tensor, shape=(1, tensor.shape[-1])) if name.endswith(row) else tensor
        for name, tensor in header.tensors.items()
    }


def tensors_at(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a GGUF file, or of a folder. Raises WeightError."""
    return stored_tensors(read_gguf(path)) if path.suffix == GGUF else shards.stored_tensors(path)


def _stored(module: str) -> str:
    return f"blk.{{}}.{module}" if "{}" in _MODULES[module] else module


def _gemma3(own: Fields, head_dim: int) -> dict[str, object]:
    """Queries are scaled by the size of a head, in the largest model by hidden_size over heads."""
    scalar = own.whole("embedding_length") / own.whole("attention.head_count")
    if own.get("attention.scale") is not None:
        scalar = own.number("attention.scale") ** -2
    elif own.get("block_count") != 62:
        scalar = head_dim
    pattern = own.get("attention.sliding_window_pattern")
    kinds = {True: "sliding_attention", False: "full_attention"}
    listed = [kinds[bool(one)] for one in pattern] if isinstance(pattern, list) else None
    return {
        "query_pre_attn_scalar": scalar,
        "rope_local_base_freq": own.get("rope.freq_base_swa"),
        "sliding_window_pattern": pattern if listed is None else None,
        "layer_types": listed,
    }


def _experts(header: GgufHeader, own: Fields) -> dict[str, object]:
    layers = range(own.whole("block_count", most=10_000))
    return {
        "num_experts": own.whole("expert_count"),
        "num_experts_per_tok": own.whole("expert_used_count"),
        "moe_intermediate_size": own.get("expert_feed_forward_length"),
        "shared_expert_intermediate_size": own.whole("expert_shared_feed_forward_length", 0, least=0),
        "mlp_only_layers": [i for i in layers if f"blk.{i}.ffn_gate_inp.weight" not in header.tensors],
        "decoder_sparse_step": 1,
    }


def _rope(header: GgufHeader, own: Fields, head_dim: int) -> dict[str, object]:
    turned = own.whole("rope.dimension_count", head_dim)
    found: dict[str, object] = {"rope_theta": own.number("rope.freq_base", 10_000.0)}
    if turned != head_dim:
        found["partial_rotary_factor"] = (turned + 0.5) / head_dim  # which is rounded down
    if _FACTORS in header.tensors:
        return found | {"rope_type": "factors", "factors": _numbers(header, _FACTORS, turned // 2)}
    if _LONG in header.tensors:
        lists = {"long_factor": _LONG, "short_factor": _SHORT}
        found |= {name: _numbers(header, tensor, turned // 2) for name, tensor in lists.items()}
        attention = own.get("rope.scaling.attn_factor")
        found |= {"rope_type": "longrope", "attention_factor": attention}
    elif (kind := own.text("rope.scaling.type", "none")) != "none":
        found |= {"rope_type": kind, "factor": own.number("rope.scaling.factor")}
        found |= {f"beta_{end}": own.get(f"rope.scaling.yarn_beta_{end}") for end in ("fast", "slow")}
    return found


def _numbers(header: GgufHeader, name: str, count: int) -> list[float]:
    """A small tensor, which is a fact."""
    info = header.tensors.get(name)
    if info is None or info.dtype != "F32" or info.shape != (count,):
        given = f"{info.dtype} {list(info.shape)}" if info else "missing"
        raise ConfigError(f"{name} is {given}, expected F32 [{count}].")
    with header.path.open("rb") as file:
        file.seek(info.start)
        return list(struct.unpack(f"<{count}f", file.read(info.nbytes)))


def _dtype(header: GgufHeader) -> str:
    kinds = {info.dtype for info in header.tensors.values() if len(info.shape) > 1}
    return "float32" if kinds == {"F32"} else "bfloat16" if kinds <= {"F32", "BF16"} else "float16"


def _quantization(header: GgufHeader) -> dict[str, object] | None:
    """The bits of most matrices, and by name of those that have others or are floats."""
    bits = {
        _wanted(name.removesuffix(".weight")): BITS.get(info.dtype)
        for name, info in header.tensors.items()
        if len(info.shape) > 1
    }
    counts = Counter(count for count in bits.values() if count)
    if not counts:
        return None
    most = counts.most_common(1)[0][0]
    others = {
        name: {"bits": count, "group_size": GROUP} if count else False
        for name, count in bits.items()
        if count != most
    }
    return {"bits": most, "group_size": GROUP, **others}


def _wanted(module: str) -> str:
    """The name that the model has for a module of the file; its own where there is none."""
    head, _, rest = module.removeprefix("blk.").partition(".")
    return _MODULES.get(rest or head, module).replace("{}", head, 1)
