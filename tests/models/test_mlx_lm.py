"""Greedy tokens against mlx-lm on the same checkpoints in float32, quantized ones too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import utils as mlx_lm

from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.loading import load_model

PROMPT = [1, 17, 44, 3, 29, 8, 60, 31]
COUNT = 40
pytestmark = pytest.mark.usefixtures("backend")


def respelled(folder: Path, copy: Path) -> Path:
    """A copy whose config has RoPE and experts as transformers 4 spells them: mlx-lm reads no other."""
    shutil.copytree(folder, copy)
    path = copy / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config))
    return copy


def peer(folder: Path) -> tuple[nn.Module, dict[str, object]]:
    """mlx-lm's model and config of a folder, in float32."""
    model, config = mlx_lm.load_model(folder)
    model.set_dtype(mx.float32)
    return model, config


def peer_answer(model: nn.Module, prompt: list[int], count: int) -> tuple[list[int], mx.array]:
    """mlx-lm's greedy ids, without a cache, and its logits [T, V] of the prompt."""
    tokens, prompt_logits = list(prompt), model(mx.array([prompt]))[0]
    for _ in range(count):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1]).item()))
    return tokens[len(prompt) :], prompt_logits


@pytest.fixture
def assert_same(make_batch, greedy, off) -> Callable[..., None]:
    """``assert_same(model, folder, prompt)``: our loader on ``folder`` answers as mlx-lm's ``model`` does."""

    def check(model: nn.Module, folder: Path, prompt: list[int] = PROMPT) -> None:
        ours = load_model(folder, dtype="float32", activations="exact")
        answer, logits = peer_answer(model, prompt, COUNT)
        error = off(ours(make_batch(prompt), NoCache()), logits)
        assert error < 1e-4, f"the prompt's logits are off by {error:.2g} of the largest"
        mine = greedy(ours, prompt, COUNT)
        same = next((i for i, pair in enumerate(zip(mine, answer, strict=True)) if pair[0] != pair[1]), COUNT)
        assert mine == answer, f"the first {same} ids are equal"

    return check


@pytest.mark.slow
def test_same_greedy_tokens(folder: Path, tmp_path: Path, assert_same) -> None:
    if folder.name.endswith("_window"):
        pytest.skip("mlx-lm reads no window of these families")
    if folder.name == "phi3":
        pytest.skip("mlx-lm reads no window of this family, and turns all of a head")
    if folder.name in ("phi3_long", "gemma3"):
        pytest.skip("mlx-lm reads no rope_parameters of this family")
    if folder.name == "gpt2":
        pytest.skip("mlx-lm reads no GPT-2 with transformers' prefix")
    if folder.name == "ernie4_5_moe":
        pytest.skip("mlx-lm leaves out its router's correction")
    copy = respelled(folder, tmp_path / folder.name)
    assert_same(peer(copy)[0], copy)


@pytest.mark.slow
def test_same_greedy_tokens_of_a_real_model(stories260k: Path, assert_same) -> None:
    assert_same(peer(stories260k)[0], stories260k, prompt=[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "group_size"),
    [("qwen2_tied", 64), ("qwen2_tied", 32), ("qwen3", 32), ("llama_bias", 32), ("qwen3_moe", 32)],
)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_same_greedy_tokens_quantized_by_mlx_lm(
    golden: Path, tmp_path: Path, assert_same, case: str, group_size: int, bits: int
) -> None:
    model, config = peer(respelled(golden / case, tmp_path / "float"))
    model, config = mlx_lm.quantize_model(model, config, group_size, bits)
    save(model, config, tmp_path / "quantized")
    assert_same(model, tmp_path / "quantized")


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"), [("affine", 5, 32), ("mxfp4", 4, 32), ("nvfp4", 4, 16)]
)
def test_same_greedy_tokens_of_odd_bits_and_small_floats(
    golden: Path, tmp_path: Path, assert_same, mode: str, bits: int, group_size: int
) -> None:
    model, config = peer(respelled(golden / "qwen3_moe", tmp_path / "float"))
    model, config = mlx_lm.quantize_model(model, config, group_size, bits, mode=mode)
    save(model, config, tmp_path / "quantized")
    assert_same(model, tmp_path / "quantized")


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_a_router_is_float32_though_it_is_stored_quantized(golden: Path, tmp_path: Path, mode: str) -> None:
    """What meets quantized matrices is rounded to int8 on the CPU: a token might go to other experts."""
    model, config = peer(respelled(golden / "qwen3_moe", tmp_path / "float"))
    everything = None if mode == "affine" else lambda path, module: hasattr(module, "to_quantized")
    model, config = mlx_lm.quantize_model(model, config, 32, 4, mode=mode, quant_predicate=everything)
    save(model, config, tmp_path / "quantized")
    router = load_model(tmp_path / "quantized").layers[1].mlp.router.weight
    assert getattr(router, "bits", 32) == 32 and router.shape == (5, 64)
    assert isinstance(model.layers[1].mlp.gate, nn.QuantizedLinear), "this checkpoint cannot show it"


def test_same_greedy_tokens_of_a_mixed_quantization(golden: Path, tmp_path: Path, assert_same) -> None:
    """8 bits for down_proj, none for the head and the embedding, 4 for the rest."""

    def choose(path: str, _module: nn.Module) -> bool | dict[str, object]:
        if "down_proj" in path:
            return {"group_size": 32, "bits": 8, "mode": "affine"}
        return "layers" in path

    model, config = peer(respelled(golden / "qwen2_untied_sharded", tmp_path / "float"))
    model, config = mlx_lm.quantize_model(model, config, 32, 4, quant_predicate=choose)
    save(model, config, tmp_path / "quantized")
    assert_same(model, tmp_path / "quantized")


@pytest.mark.slow
def test_same_greedy_tokens_of_a_real_quantized_model(stories260k: Path, tmp_path: Path, assert_same) -> None:
    """Its MLP is 172 wide, which no group divides: mlx-lm leaves down_proj as it is."""
    model, config = mlx_lm.quantize_model(*peer(stories260k), 64, 8)
    save(model, config, tmp_path / "quantized")
    assert_same(model, tmp_path / "quantized", prompt=[1])


def save(model: nn.Module, config: dict[str, object], folder: Path) -> None:
    """Write a checkpoint with mlx-lm's own functions."""
    mlx_lm.save_model(folder, model)
    mlx_lm.save_config(config, folder / "config.json")
