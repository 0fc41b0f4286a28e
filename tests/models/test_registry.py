"""The registry: what it loads, what it refuses, and how a plug-in joins it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.data import QuantizedTensor
from tiny_llm.errors import ConfigError, WeightError
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.decoder import Decoder
from tiny_llm.models.loading import load_model
from tiny_llm.models.registry import expected_tensors, load_config, quantizable_tensors

PLUGIN = """
from dataclasses import dataclass
from functools import partial
import mlx.core as mx
from tiny_llm.config import ModelConfig
from tiny_llm.families.family import Family
from tiny_llm.models.registry import Architecture

@dataclass(frozen=True)
class Bigram:
    config: ModelConfig
    table: mx.array
    def __call__(self, batch, kv):
        return self.table[batch.tokens][batch.logit_rows]

def shapes(config):
    return {"table": (config.vocab_size, config.vocab_size)}

def build(config, weights):
    return Bigram(config, weights["table"])

BIGRAM = Architecture(partial(ModelConfig.from_hf, family=Family()), shapes, build)
MISTAKEN = "bigram"
"""


def edited(folder: Path, copy: Path, **changes: object) -> Path:
    """A copy of a checkpoint with fields of its config.json changed."""
    shutil.copytree(folder, copy)
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution with entry points in our group."""
    site = tmp_path / "site"
    info = site / "bigram-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "bigram_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bigram\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[tiny_llm.models]\nbigram = bigram_plugin:BIGRAM\nmistaken = bigram_plugin:MISTAKEN\n"
    )
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.chapter("1.5")
def test_the_checkpoint_that_a_config_expects(golden: Path) -> None:
    config = load_config(golden / "qwen3")
    shapes = expected_tensors(config)
    stored = mx.load(str(golden / "qwen3" / "model.safetensors"))
    assert shapes == {name: array.shape for name, array in stored.items()}
    norms = {name for name in shapes if "norm" in name}
    assert quantizable_tensors(config) == set(shapes) - norms, "every matrix, and nothing else"


@pytest.mark.chapter("1.5")
def test_a_folder_that_does_not_fit_its_config(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"missing: lm_head.weight \[120, 32\]"):
        load_model(edited(golden / "qwen3", tmp_path / "untied", tie_word_embeddings=False))
    with pytest.raises(WeightError, match=r"model.layers.0.mlp.down_proj.weight is \[32, 32\], expected"):
        load_model(edited(golden / "qwen3", tmp_path / "wide", intermediate_size=64))


def test_options_that_cannot_be_used(golden: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype is 'int8', expected one of float32, bfloat16, float16"):
        load_model(golden / "qwen3", dtype="int8")
    with pytest.raises(ConfigError, match=r"quantize is 5, expected 4 or 8 bits"):
        load_model(golden / "qwen3", quantize=5)
    with pytest.raises(ConfigError, match=r"quantize is 4\.0, expected 4 or 8 bits"):
        load_model(golden / "qwen3", quantize=4.0)  # type: ignore[arg-type]


@pytest.mark.usefixtures("ref")
def test_the_default_dtype_suits_the_device(golden: Path) -> None:
    model = load_model(golden / "qwen3")
    assert isinstance(model, Decoder)
    on_cpu = mx.default_device().type == mx.cpu
    assert model.norm.weight.dtype == (mx.float32 if on_cpu else mx.bfloat16)


def test_progress_reaches_the_whole(golden: Path) -> None:
    calls: list[tuple[int, int]] = []
    model = load_model(golden / "qwen3", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] == 2 * sum(map(math.prod, expected_tensors(model.config).values()))


def test_a_quantized_head_and_embedding_are_one_tensor_where_tied(golden: Path, backend: str) -> None:
    model = load_model(golden / "qwen3", quantize=8)
    assert isinstance(model, Decoder)
    assert isinstance(model.lm_head.weight, QuantizedTensor) == (backend == "ref")
    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_plugin_adds_a_model(plugin: None, golden: Path, tmp_path: Path, make_batch) -> None:
    folder = edited(golden / "llama", tmp_path / "model", model_type="bigram", vocab_size=3)
    table = mx.arange(9, dtype=mx.float32).reshape(3, 3)
    mx.save_safetensors(str(folder / "model.safetensors"), {"table": table}, {"format": "mlx"})
    model = load_model(folder, dtype="float32")
    assert model.config.model_type == "bigram"
    assert mx.array_equal(model(make_batch([2, 0]), NoCache()), table[mx.array([2, 0])])


def test_a_plugin_that_is_no_architecture(plugin: None, golden: Path, tmp_path: Path) -> None:
    folder = edited(golden / "llama", tmp_path / "model", model_type="mistaken")
    with pytest.raises(
        ConfigError, match="plug-in bigram_plugin:MISTAKEN is 'bigram', expected an Architecture"
    ):
        load_model(folder)


def test_an_unknown_model_type_is_refused_with_near_names(golden: Path, tmp_path: Path) -> None:
    folder = edited(golden / "qwen3", tmp_path / "model", model_type="qwen4")
    with pytest.raises(
        ConfigError, match=r"config.json: model_type is 'qwen4', expected one of .* Did you mean"
    ) as e:
        load_model(folder)
    assert "'qwen3'" in str(e.value)
    assert "\n" not in str(e.value)
