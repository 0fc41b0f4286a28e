"""What a GGUF file says of its model, in the words of config.json and of Hugging Face's tensor names.

Owns which architectures are read, their keys, and where their tensors lie. Knows no use of a fact.
Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names: gguf-py's tensor_mapping.py.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TypeVar

from tiny_llm.config_fields import Fields
from tiny_llm.errors import ConfigError, did_you_mean
from tiny_llm.families.family import Places, Stored
from tiny_llm.weights.gguf.blocks import BITS, GROUP
from tiny_llm.weights.gguf.header import GgufHeader

_T = TypeVar("_T")
MODEL_TYPES: Mapping[str, str] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""What config.json calls each architecture. "llama" is Mistral's, too."""
_MODULES: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
_NEIGHBOURS = ("llama",)  # architectures whose RoPE turns neighbours: q and k lie in that order
UNREAD = ("rope_freqs.weight",)  # by the model: it is a fact


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
    kind = fields.text("general.architecture")
    if kind not in MODEL_TYPES:
        raise ConfigError(
            f"general.architecture is {kind!r}, expected one of {', '.join(MODEL_TYPES)}."
            f"{did_you_mean(kind, MODEL_TYPES)}"
        )
    if fields.whole("split.count", 1) > 1:
        raise ConfigError(
            "The model is split over several files, of which one is given. Join them by llama.cpp's "
            "`llama-gguf-split --merge`, or take a file that is whole."
        )
    own = Fields({key.removeprefix(f"{kind}."): value for key, value in header.metadata.items()}, kind)
    heads = own.whole("attention.head_count")
    head_dim = own.whole("attention.key_length", own.whole("embedding_length") // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.whole(name, head_dim) != head_dim:
            raise own.wrong(name, f"the size of a head, {head_dim}")
    vocabulary = header.tensors.get("token_embd.weight")
    return {
        "model_type": MODEL_TYPES[kind],
        "vocab_size": vocabulary.shape[0] if vocabulary else None,
        "hidden_size": own.whole("embedding_length"),
        "num_hidden_layers": own.whole("block_count"),
        "intermediate_size": own.whole("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": own.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": own.whole("context_length"),
        "rms_norm_eps": own.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(header, own, head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "sliding_window": None,
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "dtype": _dtype(header),
        "quantization": _quantization(header),
    }


def places(header: GgufHeader, head_dim: int) -> Places:
    """Where the file has what the model wants."""
    found = {name: Stored((_stored(module),)) for module, name in _MODULES.items()}
    if header.metadata["general.architecture"] in _NEIGHBOURS:
        order = (*range(0, head_dim, 2), *range(1, head_dim, 2))
        for module in ("attn_q", "attn_k"):
            found[_MODULES[module]] = Stored((_stored(module),), order=order)
    return found


def _stored(module: str) -> str:
    return f"blk.{{}}.{module}" if "{}" in _MODULES[module] else module


def _rope(header: GgufHeader, own: Fields, head_dim: int) -> dict[str, object]:
    found: dict[str, object] = {"rope_theta": own.number("rope.freq_base", 10_000.0)}
    factors = header.tensors.get(UNREAD[0])
    if factors is not None:
        if factors.dtype != "F32" or factors.shape != (head_dim // 2,):
            raise ConfigError(
                f"{UNREAD[0]} is {factors.dtype} {list(factors.shape)}, expected F32 [{head_dim // 2}]."
            )
        with header.path.open("rb") as file:
            file.seek(factors.start)
            divisors = struct.unpack(f"<{head_dim // 2}f", file.read(factors.nbytes))
        return found | {"rope_type": "factors", "factors": list(divisors)}
    kind = own.text("rope.scaling.type", "none")
    if kind == "none":
        return found
    found |= {"rope_type": kind, "factor": own.number("rope.scaling.factor")}
    original = own.get("rope.scaling.original_context_length")
    return found if original is None else {**found, "original_max_position_embeddings": original}


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
