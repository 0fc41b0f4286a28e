"""A rank reads its own part of a checkpoint, and holds little more while it does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tiny_llm.config import ModelConfig, Quantization
from tiny_llm.data import QuantizedTensor
from tiny_llm.models.registry import expected_tensors, quantizable_tensors
from tiny_llm.weights.dummy import dummy_weights
from tiny_llm.weights.quantize import part_names

LOAD = """
import json, sys
from pathlib import Path
import mlx.core as mx
from tiny_llm.distributed.group import Alone
from tiny_llm.memory import peak_memory_bytes
from tiny_llm.models.loading import load_model, weight_bytes
mx.eval(mx.zeros((1,)) + 1)  # what the library takes for itself
before = peak_memory_bytes()
model = load_model(Path(sys.argv[1]), group=Alone(int(sys.argv[2]), int(sys.argv[3])))
print(json.dumps([peak_memory_bytes() - before, weight_bytes(model)]))
"""
SIZES = {"hidden_size": 768, "num_hidden_layers": 20, "num_attention_heads": 12, "num_key_value_heads": 4}
SIZES |= {"vocab_size": 16_000}
DENSE = {"model_type": "qwen2", "intermediate_size": 2048}
MIXTURE = {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 256,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}


def _write(folder: Path, config: dict[str, Any], bits: int | None) -> None:
    """A checkpoint of noise, in mlx-lm's layout."""
    facts = ModelConfig.from_hf(config)
    format = None if bits is None else Quantization(bits, 64)
    weights = dummy_weights(
        expected_tensors(facts), dtype=mx.bfloat16, quantize=format, quantizable=quantizable_tensors(facts)
    )
    arrays: dict[str, mx.array] = {}
    for name, weight in weights.items():
        if isinstance(weight, QuantizedTensor):
            parts = weight.packed, weight.scales, weight.biases
            arrays |= dict(zip(part_names(name), parts, strict=True))
        elif isinstance(weight, mx.array):
            arrays[name] = weight
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    packed = {} if bits is None else {"quantization": {"bits": bits, "group_size": 64}}
    (folder / "config.json").write_text(json.dumps({**config, **packed}))


def _loaded(folder: Path, rank: int, size: int) -> tuple[int, int]:
    """Bytes that loading takes at most, and that the weights take then."""
    command = [sys.executable, "-c", LOAD, str(folder), str(rank), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    peak, held = json.loads(done.stdout)
    return peak, held


@pytest.fixture(scope="module")
def code(golden: Path) -> int:
    """Bytes that loading a model of no size takes."""
    return _loaded(golden / "qwen2_tied", 0, 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "bits", "size"), [(DENSE, None, 4), (MIXTURE, 4, 2)], ids=["dense", "experts"]
)
def test_a_rank_takes_its_part_of_the_memory(
    code: int, tmp_path: Path, config: dict[str, Any], bits: int | None, size: int
) -> None:
    _write(tmp_path, SIZES | config, bits)
    most, whole = _loaded(tmp_path, 0, 1)
    peak, held = _loaded(tmp_path, size - 1, size)
    assert held <= whole / size * 1.02, f"the last rank holds {held * size / whole:.2f} of its part"
    part = (peak - code) * size / (most - code)
    assert part <= 1.10, f"the last rank took {part:.2f} of its part of {most}"
