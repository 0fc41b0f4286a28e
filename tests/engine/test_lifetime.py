"""Who may use an LLM and until when: streams that nobody reads, threads, forks, close."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tiny_llm import LLM, AsyncLLM, SamplingParams
from tiny_llm.engine.async_llm import EngineDeadError
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.errors import TinyLLMError, UsageError

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
LONG = SamplingParams(max_tokens=64, ignore_eos=True)


@pytest.fixture
def own(llm: LLM) -> LLM:
    """An engine that no other test uses."""
    return llm.with_engine(EngineSettings(kv_blocks=64))


def in_thread(job: Callable[[], Any]) -> Any:
    """What ``job`` returns or raises on a thread of its own."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(job())
        except TinyLLMError as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return result[0]


def test_a_stream_that_is_never_iterated_runs_nothing(own: LLM) -> None:
    kept = [own.stream("Hello", LONG), own.stream_chat("Hello", LONG)]
    assert len(own.engine) == 0
    own.generate("Hello", GREEDY)
    assert own.engine.totals.generation_tokens == GREEDY.max_tokens, "the kept streams got tokens too"
    assert sum(len(chunk.token_ids) for chunk in kept[0]) == LONG.max_tokens, "it begins when it is asked"


def test_a_stream_left_in_a_reference_cycle_ends_with_it(own: LLM) -> None:
    streams = own.stream("Hello", LONG), own.stream_chat("Hello", LONG)
    for stream in streams:
        next(stream)
    ring: list[object] = [*streams]
    ring.append(ring)
    del streams, stream, ring
    gc.collect()
    assert len(own.engine) == 0 and own.engine.scheduler.usage().used == 0


def test_a_stream_that_is_dropped_within_a_step_ends_after_it(own: LLM) -> None:
    """As the garbage collector may do at any allocation; the step must not lose its sequences under way."""
    expected = own.generate("What is 20 + 30?", GREEDY)[0].token_ids
    dropped = [own.stream("Hello", LONG)]
    next(dropped[0])

    def drop(tokens: list[int], logits: mx.array) -> mx.array:
        dropped.clear()
        return logits

    params = SamplingParams(max_tokens=16, ignore_eos=True, processors=(drop,))
    assert own.generate("What is 20 + 30?", params)[0].token_ids == expected
    assert len(own.engine) == 0 and own.engine.scheduler.usage().used == 0
    assert not own.engine.totals.failed_steps


def test_a_second_thread_is_told_to_use_async_llm(own: LLM) -> None:
    """It was "There is no Stream(cpu, 1) in current thread", and both requests died of it."""
    alone = own.generate("Hello", LONG)[0].token_ids
    stream = own.stream("Hello", LONG)
    chunks = [next(stream)]
    for job in (lambda: own.generate("Hello", GREEDY), own.close, lambda: next(stream)):
        error = in_thread(job)
        assert isinstance(error, UsageError) and "AsyncLLM" in str(error), job
    with pytest.raises(StopIteration):
        next(stream)  # a generator that raised has ended
    stream = own.stream("Hello", LONG)
    chunks = [next(stream)]
    assert isinstance(in_thread(lambda: own.generate("Hello", GREEDY)), UsageError)
    chunks += stream
    assert [token for chunk in chunks for token in chunk.token_ids] == alone
    assert not own.engine.totals.failed_steps


def test_threads_may_take_turns(own: LLM) -> None:
    alone = own.generate("Hello", GREEDY)[0].token_ids
    for _ in range(3):
        assert in_thread(lambda: own.generate("Hello", GREEDY))[0].token_ids == alone
        stream = own.stream("Hello", LONG)  # with the step after its first one prepared ahead
        next(stream), next(stream), next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert len(own.engine) == 0
    assert not own.engine.totals.failed_steps


def test_threads_at_once_get_their_answer_or_are_told(own: LLM) -> None:
    alone = own.generate("Hello", GREEDY)[0].token_ids
    results: list[object] = []

    def ask() -> None:
        for _ in range(8):
            try:
                results.append(own.generate("Hello", GREEDY)[0].token_ids)
            except UsageError as error:
                results.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 24
    assert all(one == alone or isinstance(one, UsageError) for one in results), results
    assert alone in results and not own.engine.totals.failed_steps and len(own.engine) == 0


FORK = """
import os, sys
from tiny_llm import LLM, AsyncLLM, SamplingParams, TinyLLMError
kind = sys.argv[1]
llm = AsyncLLM("demo") if kind == "async" else LLM("demo")
child = os.fork()
if child:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    if kind == "old":
        llm.generate("Hello", SamplingParams(max_tokens=2))
    elif kind == "new":
        LLM("demo")
    else:
        import asyncio
        asyncio.run(llm.generate("Hello", SamplingParams(max_tokens=2)))
except TinyLLMError as error:
    print(f"{type(error).__name__}: {error}", flush=True)
os._exit(7)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system does not fork")
@pytest.mark.parametrize("kind", ["old", "new", "async"])
def test_a_fork_is_told_to_spawn(kind: str) -> None:
    """It hung, and said nothing."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
    assert done.stdout.startswith("UsageError: This process was forked from process ")
    assert 'multiprocessing.get_context("spawn")' in done.stdout


def test_close_gives_the_memory_back_and_says_so_afterwards(demo: Path) -> None:
    gc.collect()
    before = mx.get_active_memory()
    with LLM(demo, backend="ref") as llm:  # whose weights are MLX's, and counted
        tokens = llm.generate("Hello", GREEDY)[0].token_ids
        stream = llm.stream("Hello", LONG)
        next(stream)
        watched = weakref.ref(llm.engine)
        weights = 4 * 5_000_000
        assert mx.get_active_memory() - before > weights / 2
    gc.collect()
    assert watched() is None, "who holds the engine holds its pool"
    assert mx.get_active_memory() - before < weights / 100
    llm.close()  # again
    for use in (
        lambda: llm.generate("Hello", GREEDY),
        lambda: llm.chat("Hello"),
        lambda: llm.stream("Hello"),
        lambda: llm.with_engine(EngineSettings(kv_blocks=64)),
        lambda: llm.engine,
        lambda: llm.memory,
        lambda: next(stream),
    ):
        with pytest.raises(UsageError, match=r"This LLM \(.*demo\) is closed; make another one\."):
            use()
    assert repr(llm) == f"<LLM {demo}, closed>"
    assert LLM(demo, backend="ref").generate("Hello", GREEDY)[0].token_ids == tokens


def test_close_leaves_another_engine_on_the_same_weights_alone(llm: LLM) -> None:
    expected = llm.generate("Hello", GREEDY)[0].token_ids
    with llm.with_engine(EngineSettings(kv_blocks=64)) as other:
        assert other.generate("Hello", GREEDY)[0].token_ids == expected
    assert llm.generate("Hello", GREEDY)[0].token_ids == expected


def test_repr_says_model_backend_and_memory(llm: LLM) -> None:
    assert repr(llm) == f"<LLM demo on {llm.backend}: {llm.memory}>"
    assert "weights 0.0" in repr(llm) and "keys and values up to" in repr(llm)


def test_async_llm_closes_with_its_block(demo: Path) -> None:
    async def use() -> AsyncLLM:
        async with AsyncLLM(demo) as llm:
            assert repr(llm).startswith(f"<AsyncLLM {demo} on ")
            assert len((await llm.generate("Hello", GREEDY))[0].token_ids) == 16
        with pytest.raises(EngineDeadError, match="it was closed"):
            await llm.generate("Hello", GREEDY)
        return llm

    llm = asyncio.run(use())
    llm.close()  # again
    assert repr(llm) == f"<AsyncLLM {demo}, closed>" and llm.llm._model is None
