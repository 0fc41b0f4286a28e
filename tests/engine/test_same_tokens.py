"""Same tokens, whatever the traffic: a request's output is that of the request alone, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm import LLM, Completion, SamplingParams
from tiny_llm.engine import sample_step
from tiny_llm.engine.engine import EngineSettings
from tiny_llm.scheduler.settings import SchedulerSettings

TOPICS = (
    "a KV cache",
    "paged attention",
    "a block table",
    "prefill",
    "continuous batching",
    "a fox",
    "34 + 25",
)
Ask = tuple[list[int], SamplingParams, int, int]
"""prompt, params, priority, the step at which it arrives"""


@pytest.fixture(scope="module")
def llm(demo: Path) -> LLM:
    """The bundled model, on the best backend of this machine."""
    return LLM(demo)


def traffic(llm: LLM, seed: int, count: int) -> list[Ask]:
    """Random requests: greedy and sampled, some with a shared beginning, some with penalties."""
    chance = random.Random(seed)
    asks: list[Ask] = []
    for _ in range(count):
        system = "You answer questions about serving language models. " * chance.choice((0, 1, 6))
        question = f"What is {chance.choice(TOPICS)}?"
        messages = [{"role": "user", "content": system + question}]
        params = SamplingParams(
            max_tokens=chance.randint(1, 48),
            temperature=chance.choice((0, 0, 0.8, 1.5)),
            top_k=chance.choice((0, 5)),
            top_p=chance.choice((1, 0.9)),
            seed=chance.randrange(100),
            repetition_penalty=chance.choice((1, 1, 1.2)),
            presence_penalty=chance.choice((0, 0, 0.5)),
            logit_bias=chance.choice((None, {5: 2.0, 7: -3.0})),
            ignore_eos=chance.random() < 0.5,
        )
        asks.append((llm.chat_prompt(messages), params, chance.randint(-2, 2), chance.randint(0, 12)))
    return asks


def alone(llm: LLM, asks: Sequence[Ask]) -> list[list[int]]:
    """Each request by itself, nothing remembered between them."""
    fresh = [llm.with_engine(EngineSettings(kv_blocks=64, prefix_cache=False)) for _ in asks]
    return [own.generate(p, params)[0].token_ids for own, (p, params, _, _) in zip(fresh, asks, strict=True)]


def together(llm: LLM, settings: EngineSettings, asks: Sequence[Ask]) -> list[list[int]]:
    """All through one engine, each added at its step."""
    engine = llm.with_engine(settings).engine
    numbers: dict[int, int] = {}
    done: dict[int, Completion] = {}
    step = 0
    while len(done) < len(asks):
        for index, (prompt, params, priority, at) in enumerate(asks):
            if at == step:
                numbers[engine.add(prompt, params, priority=priority)] = index
        for number, chunk in engine.step():
            if chunk.completion is not None:
                done[numbers[number]] = chunk.completion
        engine.scheduler.check_integrity()
        step += 1
        assert step < 5000, "the engine does not get on"
    assert not len(engine)
    return [done[index].token_ids for index in range(len(asks))]


SETTINGS: Mapping[str, EngineSettings] = {
    "roomy": EngineSettings(kv_blocks=512),
    "no prefix cache": EngineSettings(kv_blocks=512, prefix_cache=False),
    "blocks of 32": EngineSettings(kv_blocks=256, block_size=32),
    "small chunks": EngineSettings(
        kv_blocks=512, scheduler=SchedulerSettings(max_num_batched_tokens=9, max_num_seqs=8)
    ),
    "recompute": EngineSettings(kv_blocks=14, scheduler=SchedulerSettings(preemption="recompute")),
    "swap": EngineSettings(kv_blocks=14, host_blocks=64, scheduler=SchedulerSettings(preemption="swap")),
    "slabs": EngineSettings(kv_blocks=512, slab_blocks=4),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_traffic_changes_no_token(llm: LLM, name: str) -> None:
    asks = traffic(llm, seed=7, count=24)
    assert together(llm, SETTINGS[name], asks) == alone(llm, asks)


def test_64_others_change_no_token(llm: LLM) -> None:
    asks = [(prompt, params, 0, 0) for prompt, params, _, _ in traffic(llm, seed=11, count=65)]
    settings = EngineSettings(kv_blocks=1024, scheduler=SchedulerSettings(max_step_ms=1e9))
    assert together(llm, settings, asks) == alone(llm, asks)


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_swap_brings_back_the_keys_and_values_that_went_out(
    stories260k: Path, backend: str, async_scheduling: bool
) -> None:
    """The copy to the host was evaluated when others had written the blocks: three of six answers changed."""
    llm = LLM(stories260k, dtype="float32", backend=backend)
    beginnings = ("Once upon a time", "Lily had a", "The dog", "A big red", "Tom and Sam", "One day")
    prompts = [llm.tokenizer.encode(text) for text in beginnings]
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    swap = SchedulerSettings(preemption="swap")
    small = EngineSettings(kv_blocks=24, host_blocks=64, async_scheduling=async_scheduling, scheduler=swap)
    tight, roomy = llm.with_engine(small), llm.with_engine(EngineSettings(kv_blocks=512))
    expected = [answer.token_ids for answer in roomy.generate(prompts, params)]
    assert [answer.token_ids for answer in tight.generate(prompts, params)] == expected
    assert tight.engine.scheduler.preempted["swap"] > 1, "the pool is too large to show anything"


@pytest.mark.parametrize("policy", ["recompute", "swap"])
def test_preemption_happens_here(llm: LLM, policy: str) -> None:
    """The two above prove nothing unless the pool is too small for them."""
    settings = SETTINGS[policy]
    own = llm.with_engine(settings)
    for prompt, params, _, _ in traffic(llm, 7, 24):
        own.engine.add(prompt, params)
    while len(own.engine):
        own.engine.step()
    assert own.engine.scheduler.preempted[policy] > 0


def test_a_key_that_depends_on_the_batch_is_noticed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: noise that follows from the row's number in its batch."""
    asks = [(p, replace(s, temperature=1.0, seed=3, top_k=0), 0, 0) for p, s, _, _ in traffic(llm, 1, 12)]
    expected = alone(llm, asks)
    real = sample_step.sample

    def by_row(logits: mx.array, params: Sequence[SamplingParams], positions: Sequence[int]) -> mx.array:
        return real(logits, [replace(p, seed=row) for row, p in enumerate(params)], positions)

    monkeypatch.setattr(sample_step, "sample", by_row)
    assert together(llm, SETTINGS["roomy"], asks) != expected


def test_sums_that_depend_on_the_batch_are_noticed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: logits off by rounding, by as much as the batch has rows."""
    asks = [(p, replace(s, temperature=1.5, top_k=0, top_p=1.0), 0, 0) for p, s, _, _ in traffic(llm, 2, 24)]
    expected = alone(llm, asks)
    real = sample_step.sample

    def by_size(logits: mx.array, params: Sequence[SamplingParams], positions: Sequence[int]) -> mx.array:
        noise = mx.random.normal(logits.shape, key=mx.random.key(len(params))) * 0.02 * (len(params) > 1)
        return real(logits + noise, params, positions)

    monkeypatch.setattr(sample_step, "sample", by_size)
    assert together(llm, SETTINGS["roomy"], asks) != expected
