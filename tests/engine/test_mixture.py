"""Same tokens, whatever the traffic, with a mixture of experts: its other tokens do not show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm import LLM, SamplingParams
from tiny_llm.config import ModelConfig
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.models.registry import expected_tensors
from tiny_llm.ops.backend import works
from tiny_llm.scheduler.settings import SchedulerSettings

EXPERTS = {"num_experts": 9, "num_experts_per_tok": 3, "moe_intermediate_size": 96, "mlp_only_layers": [1]}
SIZES = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
FEW = SchedulerSettings(max_num_batched_tokens=9, max_num_seqs=8)
SETTINGS = {
    "together": EngineSettings(kv_blocks=256),
    "small chunks": EngineSettings(kv_blocks=256, scheduler=FEW),
    "recompute": EngineSettings(kv_blocks=14, scheduler=SchedulerSettings(preemption="recompute")),
    "swap": EngineSettings(kv_blocks=14, host_blocks=64, scheduler=SchedulerSettings(preemption="swap")),
}


@pytest.fixture(scope="module")
def folder(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-MoE with the bundled model's tokenizer."""
    made = tmp_path_factory.mktemp("mixture")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, made)
    config = {
        "model_type": "qwen2_moe",
        "vocab_size": 2048,
        "max_position_embeddings": 1024,
        "dtype": "float32",
    }
    config |= SIZES | EXPERTS | {"shared_expert_intermediate_size": 64, "intermediate_size": 192}
    (made / "config.json").write_text(json.dumps(config))
    shapes = expected_tensors(ModelConfig.from_hf(config))
    keys = mx.random.split(mx.random.key(3), len(shapes))
    weights = {
        name: mx.ones(shape) if len(shape) == 1 else mx.random.normal(shape, key=key) * 2 * shape[-1] ** -0.5
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }
    mx.save_safetensors(str(made / "model.safetensors"), weights)
    return made


@pytest.mark.slow
@pytest.mark.skipif(not works(), reason="the CPU kernels were not built: no C++ compiler")
@pytest.mark.parametrize("quantize", [None, 4])
def test_traffic_changes_no_token_of_a_mixture(folder: Path, quantize: int | None) -> None:
    llm = LLM(folder, backend="cpu", quantize=quantize)
    prompts = [[(i * 31 + j * 7) % 2000 for j in range(3 + 9 * (i % 5))] for i in range(12)]
    params = [
        SamplingParams(max_tokens=20, temperature=i % 3 * 0.5, seed=i, ignore_eos=True)
        for i in range(len(prompts))
    ]
    apart = llm.with_engine(EngineSettings(kv_blocks=64, prefix_cache=False, speculate="off"))
    want = [apart.generate([p], own)[0].token_ids for p, own in zip(prompts, params, strict=True)]
    assert len({tuple(tokens) for tokens in want}) == len(prompts), "the prompts make no difference"
    for name, settings in SETTINGS.items():
        got = [one.token_ids for one in llm.with_engine(settings).generate(prompts, params)]
        wrong = [i for i in range(len(prompts)) if got[i] != want[i]]
        assert not wrong, f"{name}: request {wrong[0]} got {got[wrong[0]]}, alone {want[wrong[0]]}"
