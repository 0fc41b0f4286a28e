"""A GGUF file with a config's shapes and random Q4_0 weights, for llama.cpp.

    python random_gguf.py CONFIG FOLDER TOKENIZER      prints its path; CONFIG is JSON

Without a tokenizer's folder it has no vocabulary; with one (byte-level BPE, as Qwen2's), it makes text.
Where CONFIG has "foretold", its text is known, as measure/foretold.py says.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ARCHITECTURES = {"qwen2_moe": "qwen2moe"}  # where llama.cpp's name is another
BLOCK, BLOCK_BYTES = 32, 18  # Q4_0: a float16 scale and 32 values of 4 bits
Q4_0 = gguf.GGMLQuantizationType.Q4_0
Config = Mapping[str, Any]


def gguf_of(config: Config, folder: str, tokenizer: Path | None = None) -> Path:
    """The path of the file in ``folder``, which is made where it is missing."""
    number = {name: value for name, value in config.items() if isinstance(value, int | float)}
    sizes = "x".join(
        str(int(number[f])) for f in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    )
    kinds = {
        "-head": not config["tie_word_embeddings"],
        "-foretold": "foretold" in config,
        "-text": tokenizer,
    }
    kind = "".join(name for name, has in kinds.items() if has)
    path = Path(folder) / f"{config['model_type']}-{sizes}-q4_0{kind}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        _write(part, config, number, tokenizer)
        part.replace(path)
    return path


def _write(path: Path, config: Config, number: Mapping[str, float], tokenizer: Path | None) -> None:
    model_type = str(config["model_type"])
    writer = gguf.GGUFWriter(str(path), ARCHITECTURES.get(model_type, model_type))
    heads, hidden = int(number["num_attention_heads"]), int(number["hidden_size"])
    writer.add_context_length(int(number["max_position_embeddings"]))
    writer.add_embedding_length(hidden)
    writer.add_block_count(int(number["num_hidden_layers"]))
    writer.add_feed_forward_length(int(number["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(number["num_key_value_heads"]))
    writer.add_rope_freq_base(float(number["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(number["rms_norm_eps"]))
    writer.add_vocab_size(int(number["vocab_size"]))
    if "num_experts" in number:
        _write_expert_facts(writer, number)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        given = json.loads((tokenizer / "tokenizer.json").read_text())
        _write_vocabulary(writer, given, int(number["vocab_size"]))
    _add_tensors(writer, model_type, number, config.get("foretold"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_expert_facts(writer: gguf.GGUFWriter, number: Mapping[str, float]) -> None:
    writer.add_expert_count(int(number["num_experts"]))
    writer.add_expert_used_count(int(number["num_experts_per_tok"]))
    writer.add_expert_feed_forward_length(_expert_width(number))
    if "shared_expert_intermediate_size" in number:
        writer.add_expert_shared_feed_forward_length(int(number["shared_expert_intermediate_size"]))


def _expert_width(number: Mapping[str, float]) -> int:
    return int(number.get("moe_intermediate_size", number["intermediate_size"]))


def _add_tensors(
    writer: gguf.GGUFWriter, model_type: str, number: Mapping[str, float], foretold: Config | None
) -> None:
    """Vectors of ones and zeros, random matrices; what is foretold has the moved embedding as its head.

    Routers are float32, as llama.cpp keeps them.
    """
    rng = np.random.default_rng(0)
    embedding = np.empty(0, np.uint8)
    for name, shape in _tensors(model_type, number):
        if name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(name, rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5)
            continue
        if len(shape) == 1:
            fill = 1.0 if name.endswith("norm.weight") else 0.0
            writer.add_tensor(name, np.full(shape, fill, np.float32))
            continue
        if foretold and name == HEAD:
            matrix = np.roll(embedding, foretold["stride"], axis=0)
        else:
            rows, columns = math.prod(shape[:-1]), shape[-1]
            packed = _random_q4(rng, rows, columns, _deviation(name, columns, foretold))
            matrix = packed.reshape(*shape[:-1], -1)
        if name == EMBEDDING:
            embedding = matrix
        writer.add_tensor(name, matrix, raw_dtype=Q4_0)


def _deviation(name: str, columns: int, foretold: Config | None) -> float:
    """Of a matrix's entries: a product keeps its input's size, but for what is foretold."""
    if foretold and name == EMBEDDING:
        return 1.0
    is_added = name.endswith(("attn_output.weight", "ffn_down.weight"))
    return float(columns**-0.5 * (foretold["little"] if foretold and is_added else 1))


def _write_vocabulary(writer: gguf.GGUFWriter, given: Mapping[str, Any], size: int) -> None:
    """A byte-level BPE's tokens and merges; the model's spare rows are unused tokens."""
    tokens = [f"[unused {i}]" for i in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, i in given["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in given["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], gguf.TokenType.CONTROL
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in given["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(given["added_tokens"][0]["id"])


def _tensors(model_type: str, number: Mapping[str, float]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A model's tensors by their GGUF names, the embedding before the head; a tied one is not stored."""
    hidden = int(number["hidden_size"])
    kv = hidden // int(number["num_attention_heads"]) * int(number["num_key_value_heads"])
    yield EMBEDDING, (int(number["vocab_size"]), hidden)
    for layer in range(int(number["num_hidden_layers"])):
        for name, rows in (("attn_q", hidden), ("attn_k", kv), ("attn_v", kv)):
            yield f"blk.{layer}.{name}.weight", (rows, hidden)
            if model_type.startswith("qwen2"):
                yield f"blk.{layer}.{name}.bias", (rows,)
        if model_type == "olmoe":
            yield f"blk.{layer}.attn_q_norm.weight", (hidden,)
            yield f"blk.{layer}.attn_k_norm.weight", (kv,)
        yield f"blk.{layer}.attn_output.weight", (hidden, hidden)
        for name, shape in _mlp_tensors(number):
            yield f"blk.{layer}.{name}.weight", shape
        yield f"blk.{layer}.attn_norm.weight", (hidden,)
        yield f"blk.{layer}.ffn_norm.weight", (hidden,)
    yield "output_norm.weight", (hidden,)
    if not number["tie_word_embeddings"]:
        yield HEAD, (int(number["vocab_size"]), hidden)


def _mlp_tensors(number: Mapping[str, float]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of one layer: an MLP, or a router, its experts, and perhaps one that is shared, with its gate."""
    hidden = int(number["hidden_size"])
    if "num_experts" not in number:
        yield from _gated_tensors("", (), hidden, int(number["intermediate_size"]))
        return
    count, shared = int(number["num_experts"]), int(number.get("shared_expert_intermediate_size", 0))
    yield "ffn_gate_inp", (count, hidden)
    yield from _gated_tensors("_exps", (count,), hidden, _expert_width(number))
    if shared:
        yield "ffn_gate_inp_shexp", (hidden,)
        yield from _gated_tensors("_shexp", (), hidden, shared)


def _gated_tensors(
    kind: str, count: tuple[int, ...], hidden: int, middle: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"ffn_gate{kind}", (*count, middle, hidden)
    yield f"ffn_up{kind}", (*count, middle, hidden)
    yield f"ffn_down{kind}", (*count, hidden, middle)


def _random_q4(rng: np.random.Generator, rows: int, columns: int, deviation: float) -> np.ndarray:
    """Packed Q4_0 rows of about that standard deviation, as uint8 [rows, bytes]."""
    # Of -8 to 7 the first is left out: a mean beside 0 grows from layer to layer, until all tokens are alike.
    pairs = np.array([16 * high + low for high in range(1, 16) for low in range(1, 16)], np.uint8)
    blocks = pairs[rng.integers(0, len(pairs), (rows, columns // BLOCK, BLOCK_BYTES), dtype=np.uint8)]
    deviation_of_4_bits = 4.3
    scale = np.array([deviation / deviation_of_4_bits], np.float16)
    blocks[:, :, :2] = scale.view(np.uint8)
    return blocks.reshape(rows, -1)


if __name__ == "__main__":
    print(gguf_of(json.loads(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
