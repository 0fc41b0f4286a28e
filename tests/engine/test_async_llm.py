"""Many callers at once through asyncio: same tokens, early leavers, refusals, and the end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny_llm import LLM, RequestError, SamplingParams
from tiny_llm.engine.async_llm import AsyncLLM, EngineDeadError

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def served(demo: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(demo)
    yield llm
    llm.close()
    assert not llm.alive


def test_answers_are_those_of_each_alone(served: AsyncLLM, llm: LLM) -> None:
    prompts = [f"Tell me about the number {i}." for i in range(12)]

    async def ask_all() -> list[list[int]]:
        answers = await asyncio.gather(*(served.generate(prompt, GREEDY) for prompt in prompts))
        return [completions[0].token_ids for completions in answers]

    assert asyncio.run(ask_all()) == [llm.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]


def test_who_leaves_early_stops_the_work(served: AsyncLLM) -> None:
    async def leave() -> None:
        stream = served.stream("A long story.", SamplingParams(max_tokens=500, ignore_eos=True))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        assert (await served.generate("Short.", GREEDY))[0].finish_reason == "length"

    asyncio.run(leave())
    engine = served.llm.engine
    assert not len(engine) and engine.scheduler.usage().used == 0


def test_a_refusal_reaches_its_caller_alone(served: AsyncLLM) -> None:
    async def ask() -> None:
        with pytest.raises(RequestError, match="empty"):
            await served.generate("")
        with pytest.raises(RequestError, match="priority is 5000"):
            await served.generate("Hello", GREEDY, priority=5000)
        assert (await served.generate("Hello", GREEDY))[0].error is None

    asyncio.run(ask())


def test_the_end_is_told_to_those_who_wait(demo: Path) -> None:
    async def wait() -> None:
        own = AsyncLLM(demo)
        task = asyncio.create_task(own.generate("A story.", SamplingParams(max_tokens=900, ignore_eos=True)))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(own.close)
        with pytest.raises(EngineDeadError, match="it was closed"):
            await task
        with pytest.raises(EngineDeadError, match="it was closed"):
            await own.generate("More?")

    asyncio.run(wait())


def test_a_model_that_cannot_be_loaded_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"config\.json"):
        AsyncLLM(tmp_path)


def test_memory_is_given_back_when_nobody_asks(demo: Path) -> None:
    async def ask_and_wait() -> None:
        llm = AsyncLLM(demo, rest_s=0.05)
        try:
            first = await llm.generate("Hello", SamplingParams(max_tokens=4))
            while llm.llm.engine.scheduler.usage().capacity:
                await asyncio.sleep(0.01)
            again = await llm.generate("Hello", SamplingParams(max_tokens=4))
            assert again[0].token_ids == first[0].token_ids
        finally:
            llm.close()

    asyncio.run(asyncio.wait_for(ask_and_wait(), 30))


def test_who_only_looks_does_not_keep_the_memory(demo: Path) -> None:
    async def ask_and_look() -> None:
        llm = AsyncLLM(demo, rest_s=0.1)
        try:
            await llm.generate("Hello", SamplingParams(max_tokens=4))
            while await llm.call(lambda one: one.engine.scheduler.usage().capacity):
                await asyncio.sleep(0.01)
        finally:
            llm.close()

    asyncio.run(asyncio.wait_for(ask_and_look(), 30))
