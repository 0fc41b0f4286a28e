"""Checkpoints: a folder's parts, and a kind that is no folder at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.config import ModelFacts, Quantization
from tiny_llm.config_embedding import EmbeddingFacts
from tiny_llm.data import SamplingParams
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import ConfigError
from tiny_llm.layers.named import Weights
from tiny_llm.models.checkpoint import FolderCheckpoint, Reading
from tiny_llm.models.registry import expected_tensors
from tiny_llm.tokenizer.tokenizer import Tokenizer
from tiny_llm.weights.assemble import Finish, Progress


class InMemory:
    """Arrays that somebody has: a checkpoint, since it has all that one must have."""

    def __init__(self, config: ModelFacts, tokenizer: Tokenizer, arrays: dict[str, mx.array]) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.end_ids = frozenset({2045, 10**9})
        self.embedding = EmbeddingFacts()
        self._arrays = arrays

    def tensors(
        self,
        *,
        dtype: mx.Dtype | None,
        quantize: Quantization | None,
        finish: Finish,
        progress: Progress | None = None,
    ) -> Weights:
        assert quantize is None
        arrays = {name: self._arrays[name] for name in expected_tensors(self.config)}
        return {name: finish(array.astype(dtype or array.dtype)) for name, array in arrays.items()}


def test_a_checkpoint_need_not_be_a_folder(demo: Path, backend: str) -> None:
    folder = FolderCheckpoint(demo)
    arrays = mx.load(str(demo / "model.safetensors"))
    assert isinstance(arrays, dict)
    params = SamplingParams(max_tokens=12, min_tokens=12)
    answers = [
        LLM(model, dtype="float32", backend=backend).generate("What is a KV cache?", params)[0]
        for model in (demo, InMemory(folder.config, folder.tokenizer, arrays))
    ]
    assert answers[0].token_ids == answers[1].token_ids


def test_a_folders_end_ids_come_from_all_its_files(demo_copy: Path) -> None:
    for name, ids in (("config.json", 1), ("generation_config.json", [2, 10**9])):
        path = demo_copy / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids}))
    assert FolderCheckpoint(demo_copy).end_ids == {1, 2, 10**9, 2045}, "2045 is the tokenizer's"
    assert LLM(demo_copy).end_ids == {1, 2, 2045}


def test_a_part_is_read_when_it_is_asked_for(demo_copy: Path) -> None:
    checkpoint = FolderCheckpoint(demo_copy)
    (demo_copy / "tokenizer.json").unlink()
    assert checkpoint.config.vocab_size == 2048
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        checkpoint.tokenizer  # noqa: B018


def test_experts_may_be_fused_as_transformers_keeps_them(golden: Path, tmp_path: Path) -> None:
    """``experts.gate_up_proj`` [N, 2 F, E] and ``experts.down_proj`` [N, E, F] of each layer."""
    source = golden / "qwen3_moe"
    apart = mx.load(str(source / "model.safetensors"))
    assert isinstance(apart, dict)
    fused = {name: array for name, array in apart.items() if ".experts." not in name}
    layers = sorted({name.partition(".experts.")[0] for name in apart if ".experts." in name})
    for layer in layers:
        count = len({name for name in apart if name.startswith(f"{layer}.experts.")}) // 3
        gate, up, down = (
            mx.stack([apart[f"{layer}.experts.{i}.{kind}_proj.weight"] for i in range(count)])
            for kind in ("gate", "up", "down")
        )
        fused[f"{layer}.experts.gate_up_proj"] = mx.concatenate([gate, up], axis=1)
        fused[f"{layer}.experts.down_proj"] = down
    shutil.copy(source / "config.json", tmp_path)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), fused)
    how = Reading(dtype=None, quantize=None, finish=lambda weight: weight)
    expected, got = FolderCheckpoint(source).tensors(**how), FolderCheckpoint(tmp_path).tensors(**how)
    assert layers and set(got) == set(expected)
    for name, array in expected.items():
        assert mx.array_equal(got[name], array), name
