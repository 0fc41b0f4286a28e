"""Architectures from outside, with facts and tensor names of their own: read, loaded, run from a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.data import SamplingParams
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import ConfigError, WeightError
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.checkpoint import FolderCheckpoint
from tiny_llm.models.loading import load_model, weight_bytes
from tiny_llm.models.registry import Model, expected_tensors, load_config
from tiny_llm.planning.memory import plan_memory

pytestmark = pytest.mark.usefixtures("installed")
HERE = Path(__file__).resolve().parent / "plugins"
GPT2 = {
    "model_type": "tiny_gpt2",
    "vocab_size": 2048,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "activation_function": "gelu_new",
    "eos_token_id": 2043,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
MOE = {name: value for name, value in LLAMA.items() if name != "intermediate_size"} | {
    "model_type": "tiny_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
PROMPT = [5, 17, 444, 3, 1029]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution of both plug-ins, as pip would leave it."""
    site = tmp_path / "site"
    shutil.copytree(HERE, site)
    info = site / "more_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: more-models\nVersion: 1.0\n")
    entries = "tiny_gpt2 = gpt2_plugin:GPT_2\ntiny_moe = moe_plugin:TINY_MOE\n"
    (info / "entry_points.txt").write_text(f"[tiny_llm.models]\n{entries}")
    monkeypatch.syspath_prepend(str(site))


def random_tensors(shapes: Mapping[str, Sequence[int]]) -> dict[str, mx.array]:
    mx.random.seed(12)
    found = {name: mx.random.normal(list(shape)) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    return {name: 1 + 0.1 * array if len(array.shape) == 1 else array for name, array in found.items()}


def save(folder: Path, config: Mapping[str, object], demo: Path) -> Path:
    """A folder of random weights for ``config``, with the bundled model's tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder)
    tensors = random_tensors(expected_tensors(load_config(folder)))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    return folder


def greedy(model: Model, prompt: Sequence[int], count: int, make_batch) -> list[int]:
    """The plainest loop: all of it again for each token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(mx.argmax(model(make_batch(tokens), NoCache())[-1]).item()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("config", [GPT2, MOE], ids=["gpt2", "moe"])
def test_it_is_served_from_a_folder(
    config: dict[str, object], demo: Path, tmp_path: Path, backend: str, make_batch
) -> None:
    folder = save(tmp_path / "model", config, demo)
    llm = LLM(folder, dtype="float32", activations="exact", backend=backend)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    answers = llm.generate([PROMPT, PROMPT[:3], PROMPT[1:]], params)
    model = load_model(folder, dtype="float32", activations="exact")
    for prompt, answer in zip((PROMPT, PROMPT[:3], PROMPT[1:]), answers, strict=True):
        assert answer.token_ids == greedy(model, prompt, 8, make_batch)


def test_gpt2_has_facts_and_tensors_of_its_own(demo: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", GPT2, demo)
    checkpoint = FolderCheckpoint(folder)
    assert (checkpoint.config.head_dim, checkpoint.config.num_kv_heads) == (8, 4)
    assert checkpoint.end_ids == {2043, 2045}, "config.json's and the tokenizer's"
    stored = mx.load(str(folder / "model.safetensors"))
    mask = {"h.0.attn.bias": mx.zeros((1, 1, 8, 8)), "h.0.attn.masked_bias": mx.zeros((1,))}
    mx.save_safetensors(str(folder / "model.safetensors"), {**stored, **mask}, {"format": "pt"})
    load_model(folder)
    left_over = {"h.0.attn.rotary_emb.inv_freq": mx.zeros((4,))}
    mx.save_safetensors(str(folder / "model.safetensors"), {**stored, **left_over}, {"format": "pt"})
    with pytest.raises(WeightError, match=r"not expected: h\.0\.attn\.rotary_emb\.inv_freq"):
        load_model(folder)  # the decoder's left-overs are not everyone's


def test_a_plugins_config_names_its_own_fields(tmp_path: Path, demo: Path) -> None:
    folder = save(tmp_path / "model", GPT2, demo)
    (folder / "config.json").write_text(json.dumps(GPT2 | {"n_head": None}))
    with pytest.raises(ConfigError, match=r"config.json: n_head is missing, expected a whole number"):
        load_model(folder)


def test_experts_that_are_all_alike_are_one_mlp(
    demo: Path, tmp_path: Path, backend: str, make_batch, off
) -> None:
    """Whichever two of them a token is sent to: so the whole is LLaMA with that MLP."""
    dense = save(tmp_path / "dense", LLAMA, demo)
    experts = save(tmp_path / "experts", MOE, demo)
    tensors = dict(mx.load(str(dense / "model.safetensors")))
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp"
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = tensors.pop(f"{prefix}.{name}.weight")
            tensors |= {f"{prefix}.experts.{i}.{name}.weight": weight for i in range(4)}
        tensors[f"{prefix}.router.weight"] = mx.random.normal((4, 64))
    mx.save_safetensors(str(experts / "model.safetensors"), tensors, {"format": "pt"})
    options = {"dtype": "float32", "activations": "exact"}
    plain, mixed = (
        load_model(folder, **options)(make_batch(PROMPT), NoCache()) for folder in (dense, experts)
    )
    assert off(mixed, plain) < 1e-5


@pytest.mark.slow
def test_what_is_planned_for_a_plugin_is_what_it_takes(demo: Path, tmp_path: Path, backend: str) -> None:
    for name, config, quantize in (("gpt2", GPT2, None), ("moe", MOE, None), ("packed", MOE, 8)):
        folder = save(tmp_path / name, config, demo)
        plan = plan_memory(str(folder), available=10**9, quantize=quantize)
        took = weight_bytes(load_model(folder, quantize=quantize))
        assert plan.need.weights == pytest.approx(took, rel=0.02), f"{name}: {took} bytes"
        assert plan.context == 128
