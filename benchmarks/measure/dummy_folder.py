"""A checkpoint of random 4-bit weights in a model's shapes, on disk: what a server can be started on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx

from tiny_llm.config import ModelConfig, Quantization
from tiny_llm.data import QuantizedTensor
from tiny_llm.models.loading import QUANTIZE_GROUP
from tiny_llm.models.registry import expected_tensors, quantizable_tensors
from tiny_llm.weights.dummy import dummy_weights
from tiny_llm.weights.names import config_of
from tiny_llm.weights.quantize import part_names

BITS = 4


def dummy_folder(shape: str, tokenizer: Path, parent: Path) -> Path:
    """The folder for a short name, made in ``parent`` where it is missing, with that tokenizer's files."""
    folder = parent / f"{shape}-dummy-{BITS}bit"
    if (folder / "config.json").exists():
        return folder
    part = folder.with_suffix(f".{os.getpid()}.part")
    part.mkdir(parents=True)
    for file in tokenizer.glob("*.json"):
        shutil.copy(file, part)
    write_dummy(part, shape)
    part.replace(folder)
    return folder


def write_dummy(folder: Path, shape: str) -> Path:
    """Put a short name's weights and config into ``folder``; return the weights' file."""
    facts = config_of(shape)
    config = ModelConfig.from_hf(facts)
    weights = dummy_weights(
        expected_tensors(config),
        dtype=mx.bfloat16,
        quantize=Quantization(BITS, QUANTIZE_GROUP),
        quantizable=quantizable_tensors(config),
    )
    arrays: dict[str, mx.array] = {}
    for name, weight in weights.items():
        if isinstance(weight, QuantizedTensor):
            parts = (weight.packed, weight.scales, weight.biases)
            arrays |= dict(zip(part_names(name), parts, strict=True))
        else:
            arrays[name] = weight
    file = folder / "model.safetensors"
    mx.save_safetensors(str(file), arrays)
    quantization = {"bits": BITS, "group_size": QUANTIZE_GROUP}
    (folder / "config.json").write_text(json.dumps({**facts, "quantization": quantization}))
    return file
