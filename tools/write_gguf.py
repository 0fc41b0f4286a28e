"""A model's folder as a GGUF file, by llama.cpp's own package for Python.

    python tools/write_gguf.py FOLDER FILE.gguf [TYPE]      TYPE of matrices: F32, F16, BF16, Q8_0, Q4_0 ...

Names and keys are that package's, so that our reading of them is compared with theirs. LLaMA's queries and
keys are put into the order that llama.cpp wants, as its converter does.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

ARCHITECTURES: Mapping[str, gguf.MODEL_ARCH] = {
    "ernie4_5": gguf.MODEL_ARCH.ERNIE4_5,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
}
NEIGHBOURS = (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.GRANITE, gguf.MODEL_ARCH.SMOLLM3)
GPT2_NAMES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
GPT2_NAMES |= {"n_inner": "intermediate_size", "n_positions": "max_position_embeddings"}


def write_gguf(folder: Path, path: Path, kind: str = "F16", pre: str = "qwen2") -> Path:
    """Write the file, its matrices of type ``kind`` and its vectors F32; return its path.

    A tokenizer.json is taken along: ``pre`` is what llama.cpp calls the way in which it cuts words.
    """
    given = json.loads((folder / "config.json").read_text())
    config = {GPT2_NAMES.get(name, name): value for name, value in given.items()}
    arch = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[arch])
    _add_facts(writer, config)
    if (folder / "tokenizer.json").exists():
        add_tokenizer(writer, folder, pre)
    names, common = (
        gguf.get_tensor_name_map(a, config["num_hidden_layers"]) for a in (arch, ARCHITECTURES["llama"])
    )
    for name, array in _stacked(_tensors_of(folder)).items():
        found = (some.get_name(name, try_suffixes=(".weight", ".bias")) for some in (names, common))
        stored = next(one for one in found if one is not None)
        if stored == "output.weight" and config.get("tie_word_embeddings"):
            continue
        kept = "F32" if ".ffn_gate_inp" in stored else kind
        _add_tensor(writer, stored, _ordered(name, array, arch, config), kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """A folder's tensors as float32."""
    files = [mx.load(str(file)) for file in sorted(folder.glob("model*.safetensors"))]
    return {name: np.array(array.astype(mx.float32)) for file in files for name, array in file.items()}


def _stacked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts of a layer in one tensor; the weight of a shared one as a vector."""
    stacks: dict[str, list[np.ndarray]] = {}
    for name in sorted(tensors):  # which is the order of their numbers where they are few
        stacks.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(tensors[name])
    whole = {name: np.stack(arrays) if ".experts." in name else arrays[0] for name, arrays in stacks.items()}
    return {name: array[0] if "shared_expert_gate" in name else array for name, array in whole.items()}


def _ordered(name: str, array: np.ndarray, arch: gguf.MODEL_ARCH, config: Mapping[str, Any]) -> np.ndarray:
    """Rows of LLaMA's queries and keys: neighbours turn together, where Hugging Face has halves. GPT-2's
    matrices lie transposed there, and Gemma's norms less 1.
    """
    module = name.split(".")[-2]
    if module.startswith("c_") and array.ndim > 1:
        return np.ascontiguousarray(array.T)
    if arch == gguf.MODEL_ARCH.GEMMA3 and module.endswith("norm"):
        return array + 1
    if arch not in NEIGHBOURS or module not in ("q_proj", "k_proj"):
        return array
    queries = config["num_attention_heads"]
    heads = queries if module == "q_proj" else config.get("num_key_value_heads") or queries
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def _add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
    block, _ = gguf.GGML_QUANT_SIZES[number]
    if array.shape[-1] % block:  # as llama.cpp's converter falls back
        number = gguf.GGMLQuantizationType.F16
    writer.add_tensor(name, gguf.quants.quantize(array, number), raw_dtype=number)


def _add_facts(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = rope.get("full_attention", rope)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if "layer_norm_epsilon" in config:
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    for name, add in (
        ("embedding_multiplier", writer.add_embedding_scale),
        ("attention_multiplier", writer.add_attention_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
    ):
        if config.get(name):
            add(config[name])
    if config["model_type"] == "gemma3_text":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
        writer.add_attention_scale(config["query_pre_attn_scalar"] ** -0.5)
    if config["model_type"] in ("mistral", "phi3", "gemma3_text"):
        writer.add_sliding_window(config["sliding_window"] or 0)
    if "num_experts_per_tok" in config:
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        if config.get("shared_expert_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    kind = rope.get("rope_type") or rope.get("type")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for size in ("long", "short"):
            factors = np.array(rope[f"{size}_factor"], np.float32)
            _add_tensor(writer, f"rope_factors_{size}.weight", factors, "F32")
    elif kind == "llama3":
        _add_tensor(writer, "rope_freqs.weight", _llama3_factors(rope, config, head_dim), "F32")


def _llama3_factors(rope: Mapping[str, Any], config: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """What each frequency is divided by, as llama.cpp's converter writes it."""
    base = rope.get("rope_theta") or config["rope_theta"]
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for frequency in 1.0 / base ** (np.arange(0, head_dim, 2) / head_dim):
        length = 2 * np.pi / frequency
        smooth = (original / length - low) / (high - low)
        middle = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1.0 if length < original / high else factor if length > original / low else middle)
    return np.array(factors, np.float32)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, pre: str) -> None:
    """Add what a folder's tokenizer.json and tokenizer_config.json say, in llama.cpp's words."""
    given = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    ids = dict(given["model"]["vocab"])
    added = {token["content"]: token for token in given["added_tokens"]}
    ids |= {text: token["id"] for text, token in added.items()}
    tokens = sorted(ids, key=ids.__getitem__)
    pieces = given["model"]["byte_fallback"]
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([_type(token, added) for token in tokens])
    if pieces:  # a piece's score is its rank, as SentencePiece has it
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
    else:
        writer.add_tokenizer_pre(pre)
        merges = given["model"]["merges"]
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
        writer.add_add_bos_token(bool(settings.get("add_bos_token")))
    for role, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        if settings.get(f"{role}_token"):
            add(ids[settings[f"{role}_token"]])
    if settings.get("chat_template"):
        writer.add_chat_template(settings["chat_template"])


def _type(token: str, added: Mapping[str, Mapping[str, Any]]) -> gguf.TokenType:
    if token in added and token == "<unk>":
        return gguf.TokenType.UNKNOWN
    if token in added:
        return gguf.TokenType.CONTROL if added[token]["special"] else gguf.TokenType.USER_DEFINED
    byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return gguf.TokenType.BYTE if byte else gguf.TokenType.NORMAL


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
