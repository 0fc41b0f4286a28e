"""Backend mlx behind an engine: the tokens of ``ref`` for lone requests, steps ahead, memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm import LLM, SamplingParams, memory
from tiny_llm.engine import settings
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.models.footprint import LAYERS_AT_ONCE, activation_bytes
from tiny_llm.models.registry import read_config
from tiny_llm.ops.backend import use
from tiny_llm.ops.kv_pool import GATHER_BYTES, KvFormat, may_run_ahead
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.weights.names import config_of

PROMPTS = ["a KV cache", "Tell me about paged attention.", "34 + 25 =", "Once upon a time " * 12]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
SETTINGS = EngineSettings(kv_blocks=256, slab_blocks=256, prefix_cache=False, speculate="off")


def llm_on(backend: str, demo: Path, quantize: int | None, block_size: int = 16) -> LLM:
    settings = replace(SETTINGS, block_size=block_size)
    return LLM(demo, backend=backend, dtype="float32", quantize=quantize, engine=settings)


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "block_size"), [(None, 16), (4, 32), (8, 64)])
def test_a_lone_request_gets_the_tokens_of_ref(demo: Path, quantize: int | None, block_size: int) -> None:
    told = {}
    for backend in ("ref", "mlx"):
        with llm_on(backend, demo, quantize, block_size) as own:
            told[backend] = [own.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]
    assert told["mlx"] == told["ref"]


def test_nothing_is_guessed_unless_asked_for(demo: Path) -> None:
    """How many rows are checked follows from measured times, and MLX's sums from how many rows there are."""
    with LLM(demo, backend="mlx") as own:
        assert own.engine.settings.speculate == "off" and "no guesses" in own.memory
        asked = own.with_engine(replace(SETTINGS, speculate="ngram"))
        assert asked.engine.settings.speculate == "ngram" and "no guesses" not in asked.memory


@pytest.mark.slow
def test_a_step_ahead_changes_no_token(demo: Path) -> None:
    with llm_on("mlx", demo, None) as own:
        ahead = [one.token_ids for one in own.generate(PROMPTS, GREEDY)]
        number = own.engine.add(own.check(PROMPTS[0])[0], GREEDY)
        own.engine.step()
        own.engine.step()
        assert own.engine._ahead, "nothing is in flight"
        own.engine.cancel(number)
        waited = own.with_engine(replace(SETTINGS, async_scheduling=False))
        assert [one.token_ids for one in waited.generate(PROMPTS, GREEDY)] == ahead


def test_steps_are_not_run_ahead_where_that_copies_the_pool() -> None:
    """A GPU's commands hold the pool that they read, so that MLX's scatter would write into another."""
    with use("mlx"):
        assert may_run_ahead(mx.cpu) and not may_run_ahead(mx.gpu)
    with use("metalsim", frozenset({"paged_attention", "kv_write"})):
        assert may_run_ahead(mx.gpu), "a kernel of ours writes the pool where it lies"
    with use("metalsim", frozenset({"paged_attention"})):
        assert not may_run_ahead(mx.gpu)


@pytest.mark.parametrize("requests", [1, 3])
def test_a_step_takes_no_second_pool(demo: Path, requests: int) -> None:
    with llm_on("mlx", demo, None) as own:
        waited = own.with_engine(replace(SETTINGS, async_scheduling=False))
        engine = waited.engine
        for prompt in PROMPTS[:requests]:
            engine.add(waited.check(prompt)[0], replace(GREEDY, max_tokens=40, ignore_eos=True))
        for _ in range(4):
            engine.step()
        pool = SETTINGS.kv_blocks * engine.cache.format.block_bytes
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in range(20):
            assert engine.step(), "it has ended"
        assert mx.get_peak_memory() - before < pool / 4


def test_what_attention_gathers_is_in_the_estimate_of_a_step(demo: Path) -> None:
    with llm_on("mlx", demo, None) as own, llm_on("ref", demo, None) as other:
        gathered = [one.engine.cache.format.gathered_bytes(100) for one in (own, other)]
        config = own.config
    assert gathered == [GATHER_BYTES, 0]
    with use("mlx"):
        format = KvFormat(2, 8, 128, 16, mx.float32)
    assert format.gathered_bytes(100_000) == 100_000 * 2 * 8 * 128 * 4, "one long sequence is not cut"
    more = activation_bytes(config, 64, 8, GATHER_BYTES) - activation_bytes(config, 64, 8)
    assert more == min(LAYERS_AT_ONCE, config.num_layers) * GATHER_BYTES


@pytest.mark.parametrize(("context", "least"), [(100, 512), (90_000, 256)])
def test_a_step_has_fewer_tokens_where_attention_gathers(
    context: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its largest step took more than the quarter of memory that it may."""
    config = read_config(config_of("qwen2-0.5b"))
    quarter = activation_bytes(config, 2048, 256)
    monkeypatch.setattr(settings, "available_memory_bytes", lambda: 4 * quarter)
    tokens = {}
    for backend in ("ref", "mlx"):
        with use(backend):
            fitting = EngineSettings.fitting(config, mx.float32, 4 * quarter, max_context=context)
            gathered = KvFormat.of(config, 16, mx.float32).gathered_bytes(context)
        tokens[backend] = fitting.scheduler.max_num_batched_tokens
        assert activation_bytes(config, tokens[backend], 256, gathered) <= quarter
    assert tokens == {"ref": 2048, "mlx": least}


def test_the_wired_limit_is_what_the_device_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    wired: list[int] = []
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    memory.wire_memory()
    assert wired == [], "a CPU recommends nothing"
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 2**34})
    memory.wire_memory()
    assert wired == [2**34]


def test_a_gpu_has_the_memory_that_its_device_tells() -> None:
    held = mx.get_active_memory()
    apple = memory._gpu_limit({"max_recommended_working_set_size": 2**34, "memory_size": 2**35})
    assert apple == ("the GPU", 2**34 - held, 2**34)
    card = memory._gpu_limit({"total_memory": 2**36, "free_memory": 2**30})
    assert card == ("the GPU", 2**30 + mx.get_cache_memory(), 2**36), "others hold the rest"


@pytest.mark.parametrize("backend", ["ref", "mlx", "cpu"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_of_more_tokens_than_a_step_has_is_read(
    demo: Path, backend: str, temperature: float
) -> None:
    """A step in the middle of a prompt has no row to draw from: MLX's argmax refuses an empty array."""
    params = SamplingParams(max_tokens=3, temperature=temperature, seed=1)
    settings = SchedulerSettings(max_num_batched_tokens=16, max_num_seqs=4)
    (answer,) = LLM(demo, backend=backend, scheduler=settings).generate([[5] * 40], params)
    assert answer.error is None and len(answer.token_ids) == 3
