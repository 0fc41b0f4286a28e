"""A pool that cannot grow preempts, waits and refuses; the engine goes on, and it grows when it may again."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from tests.engine.test_paging import resident_bytes
from tiny_llm import LLM, Completion, SamplingParams
from tiny_llm.engine import budget, settings
from tiny_llm.engine.budget import PoolLimit
from tiny_llm.engine.settings import EngineSettings, Speculation
from tiny_llm.errors import ConfigError
from tiny_llm.kv import paged
from tiny_llm.memory import available_memory_bytes, give_back_memory, narrowest_limit
from tiny_llm.models.footprint import activation_bytes
from tiny_llm.models.registry import read_config
from tiny_llm.ops.kv_pool import Pool
from tiny_llm.weights.names import config_of

BLOCK = 1000


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A machine whose free memory the test says; ``asked`` counts how often somebody wants to know."""
    machine = {"free": 100 * BLOCK, "kept": 0, "asked": 0}

    def free() -> int:
        machine["asked"] += 1
        return machine["free"]

    def give_back() -> None:
        machine["free"] += machine["kept"]
        machine["kept"] = 0

    monkeypatch.setattr(budget, "available_memory_bytes", free)
    monkeypatch.setattr(budget, "give_back_memory", give_back)
    return machine


def test_the_pool_may_grow_as_far_as_memory_is_there(memory: dict[str, int]) -> None:
    limit, clock = PoolLimit(200, 8, BLOCK, 10 * BLOCK, clock := Clock()), clock
    assert limit.blocks(0) == 90, "10 are left for a step"
    memory["free"] = 30 * BLOCK
    assert limit.blocks(8) == 8 + 20, "it has grown, so the machine is asked again"
    memory["free"], clock.now = 5 * BLOCK, 2.0
    assert limit.blocks(8) == 8, "others took it: the pool stays as it is"
    memory["free"], clock.now = 10**9, 2.5
    assert limit.blocks(8) == 8
    clock.now = 3.0
    assert limit.blocks(8) == 200, "a second later there is more than the operator allows"


def test_the_machine_is_asked_once_a_second_at_most(memory: dict[str, int]) -> None:
    limit, clock = PoolLimit(200, 8, BLOCK, 0, clock := Clock()), clock
    for _ in range(1000):
        limit.blocks(16)
        clock.now += 0.01
    assert memory["asked"] <= 12


def test_what_is_kept_for_later_goes_before_the_pool_stands_still(memory: dict[str, int]) -> None:
    limit = PoolLimit(200, 8, BLOCK, 0, Clock())
    memory |= {"free": 5 * BLOCK, "kept": 50 * BLOCK}
    assert limit.blocks(16) == 16 + 55


def test_the_first_slab_is_allowed_and_a_step_gets_a_quarter_at_most(memory: dict[str, int]) -> None:
    assert PoolLimit(200, 8, BLOCK, 10**9, Clock()).blocks(0) == 75
    memory["free"] = 0
    assert PoolLimit(200, 8, BLOCK, 10**9, Clock()).blocks(0) == 8
    assert PoolLimit(3, 8, BLOCK, 10**9, Clock()).blocks(0) == 3


def test_the_limit_falls_below_what_there_is_when_others_take_what_is_left_for_a_step(
    memory: dict[str, int],
) -> None:
    limit = PoolLimit(200, 8, BLOCK, 10 * BLOCK, Clock())
    memory["free"] = 4 * BLOCK
    assert limit.blocks(40) == 34 and limit.blocks(200) == 194
    memory["free"] = 9 * BLOCK
    assert limit.blocks(200) == 194 and limit.blocks(200, again=True) == 199, "no time has passed"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")
@pytest.mark.parametrize("speculate", ["off", "draft"])
def test_memory_goes_back_while_those_run_whose_blocks_lie_at_the_end(
    demo: Path, tmp_path: Path, speculate: Speculation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long prompts and two answers that go on when those have ended, and others take the memory."""
    params = SamplingParams(max_tokens=120, ignore_eos=True, n=2, temperature=1.0, seed=3)
    with LLM(demo, draft="demo-draft", kv_dtype="float32", kv_disk=tmp_path) as llm:
        expected = [answer.token_ids for answer in llm.generate([[3] * 40], params)]
        settings = EngineSettings(kv_blocks=1024, slab_blocks=16, speculate=speculate)
        engine = llm.with_engine(settings).engine
        blocks, done = engine.scheduler.blocks, list[Completion]()

        def step() -> None:
            done.extend(chunk.completion for _, chunk in engine.step() if chunk.completion)

        for number in range(12):
            engine.add([number + 5] * 900, SamplingParams(max_tokens=2, ignore_eos=True))
        engine.add([3] * 40, params)
        while len(done) < 12:
            step()
        tables = [table for _, table in engine.scheduler.running()]
        assert len(tables) == 2 and min(max(table.blocks) for table in tables) > 600
        give_back_memory()
        before, capacity = resident_bytes(), blocks.capacity
        with monkeypatch.context() as patch:
            patch.setattr(budget, "available_memory_bytes", lambda: 0)
            while len(done) < 14:
                step()
                engine.scheduler.check_integrity()
        answers = sorted(done[12:], key=lambda answer: answer.index)  # guesses may let the second end first
        assert blocks.capacity == 16 and [answer.token_ids for answer in answers] == expected
        while (disk := engine.stats().disk) and disk.blocks < 600:
            time.sleep(0.01)
        give_back_memory()
        given_back = engine.block_bytes * (capacity - blocks.capacity)
        left = 2**21 * len(engine.cache.arrays())  # a huge page each
        assert before - resident_bytes() > 0.8 * given_back - left > 20_000_000
        (again,) = llm.with_engine(settings).generate([[5] * 900], SamplingParams(max_tokens=2))
        assert again.cached_tokens == 896, "what left the pool went to disk"


def test_requests_wait_for_memory_and_only_what_can_never_run_is_refused(
    memory: dict[str, int], stories260k: Path
) -> None:
    """Memory for 16 blocks where 400 are allowed: the answers are those of a large pool."""
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    prompts = [[1, 400 + i, 300] for i in range(6)]
    llm = LLM(stories260k, dtype="float32")
    memory["free"] = 10**10
    expected = [answer.token_ids for answer in llm.generate(prompts, params)]
    memory["free"] = 0
    tight = llm.with_engine(EngineSettings(kv_blocks=400, slab_blocks=16))
    assert [answer.token_ids for answer in tight.generate(prompts, params)] == expected
    assert tight.engine.scheduler.preempted["recompute"] > 0
    assert tight.engine.scheduler.usage().capacity == 16
    long, short = tight.generate([[1] * 300, [1, 2]], params)
    assert long.finish_reason == "error" and long.error and "cannot grow beyond 16 blocks" in long.error
    assert short.error is None and len(short.token_ids) == 100
    memory["free"] = 10**10
    tight.engine.rest()
    (answer,) = tight.generate([[1] * 300], params)
    assert answer.error is None and len(answer.token_ids) == 100


def test_one_who_runs_out_alone_is_refused_and_the_engine_goes_on(
    memory: dict[str, int], stories260k: Path
) -> None:
    """It began when there was room; others took the memory, and its answer outgrows the pool."""
    llm = LLM(stories260k, dtype="float32")
    memory["free"] = 0
    tight = llm.with_engine(EngineSettings(kv_blocks=400, slab_blocks=4))
    (answer,) = tight.generate([[1, 2]], SamplingParams(max_tokens=200, ignore_eos=True))
    assert answer.finish_reason == "error" and len(answer.token_ids) == 4 * 16 - 1
    (answer,) = tight.generate([[1, 2]], SamplingParams(max_tokens=40, ignore_eos=True))
    assert answer.error is None


def test_more_than_there_can_ever_be_is_refused() -> None:
    said = r"kv_memory is 100,000,000,000,000 bytes, but .* allows [\d,]+ in all"
    with pytest.raises(ConfigError, match=said):
        LLM("demo", kv_memory=100 * 10**12)


def test_what_is_left_is_no_more_than_what_there_can_be() -> None:
    assert 0 < available_memory_bytes() <= narrowest_limit().most


def test_a_step_takes_no_more_than_a_quarter_of_a_small_container(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(config_of("qwen2-0.5b"))
    for free, most in ((3 * 10**8, 256), (2 * 10**9, 512), (10**10, 2048)):
        monkeypatch.setattr(settings, "available_memory_bytes", lambda free=free: free)
        scheduler = EngineSettings.fitting(config, mx.bfloat16).scheduler
        assert scheduler.max_num_batched_tokens == most
        assert activation_bytes(config, most, 256) <= free // 4 or most == scheduler.max_num_seqs


CHAT = """
from tiny_llm import LLM, SamplingParams
llm = LLM("demo")
answers = llm.generate(["What is 3 + 4?"] * 8, SamplingParams(max_tokens=100, ignore_eos=True))
assert [len(answer.token_ids) for answer in answers] == [100] * 8, answers
print(llm.engine.settings.kv_blocks * llm.engine.cache.format.block_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell what is mapped")
def test_under_ulimit_v_the_pool_leaves_address_space() -> None:
    """The chat ended with std::bad_alloc: half of the machine's free memory was mapped at once."""
    bound = 3_000_000 * 1024
    child = subprocess.run(
        [sys.executable, "-c", CHAT],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (bound, bound)),
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert 0 < int(child.stdout) < bound / 2


def test_a_pool_that_fails_to_grow_ends_the_step_and_not_the_engine(
    stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next ones begin in a pool as large as they need, not as large as what failed."""
    small = LLM(stories260k, backend="ref").with_engine(EngineSettings(kv_blocks=400, slab_blocks=4))
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    expected = small.generate([[1, 2]], params)

    def fail(pool: Pool, blocks: int) -> Pool:
        raise MemoryError(f"{blocks} blocks")

    monkeypatch.setattr(paged, "resize_pool", fail)
    (answer,) = small.generate([[1] * 200], params)
    assert answer.error == "The step failed: MemoryError: 16 blocks"
    assert small.engine.scheduler.usage().capacity == 0
    again = small.generate([[1, 2]], params)
    assert [a.token_ids for a in again] == [a.token_ids for a in expected] and not again[0].error
