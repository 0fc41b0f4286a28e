"""The guess of a step's time: learnt from steps alone, and safe to plan by."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import inf

import pytest

from tiny_llm.data import Advance, Plan, Sequence
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.scheduler.speed import StepTime, context_of

BOUND_MS = 100.0
Machine = Callable[[Plan, random.Random], float]


def laptop(plan: Plan, noise: random.Random) -> float:
    """Milliseconds of a step on 2 cores with 0.5B parameters: 700 tokens/s of prompt, 9 ms a decode."""
    quiet = 9 + 0.5 * plan.decodes + 1e-4 * plan.decode_context
    quiet += 1.4 * plan.chunk_tokens + 2e-4 * plan.chunk_context
    return quiet * noise.uniform(0.9, 1.05) + (noise.random() < 0.01) * 50


def graphics_card(plan: Plan, noise: random.Random) -> float:
    """A hundred times the speed, so that a step's fixed cost is most of it."""
    return 5 + laptop(plan, noise) / 100


def slowed(plan: Plan, noise: random.Random) -> float:
    """A laptop that got hot."""
    return 2 * laptop(plan, noise)


def decoding(scheduler: Scheduler, count: int, machine: Machine, noise: random.Random) -> None:
    """``count`` sequences of 100 tokens, until they all decode."""
    for number in range(count):
        scheduler.add(Sequence(number, [number] * 100, SamplingParams(max_tokens=10_000)))
    for _ in range(30):
        step(scheduler, machine, noise)


def step(scheduler: Scheduler, machine: Machine, noise: random.Random) -> tuple[Plan, float]:
    plan = scheduler.schedule()
    ms = machine(plan, noise)
    scheduler.commit(plan, [Advance(item.seq_id, (1,)) for item in plan.items if item.logit_rows])
    scheduler.speed.observe(plan, ms)
    return plan, ms


@pytest.mark.parametrize("machine", [laptop, graphics_card, slowed], ids=lambda machine: machine.__name__)
def test_a_long_prompt_keeps_the_gap_between_tokens_under_the_bound(machine: Machine) -> None:
    scheduler = Scheduler(BlockManager(16, 20_000), SchedulerSettings(max_step_ms=BOUND_MS))
    noise = random.Random(1)
    decoding(scheduler, 16, machine, noise)
    scheduler.add(Sequence(99, [7] * 8192, arrival=1.0))
    seq = scheduler.sequence(99)
    gaps: list[float] = []
    while seq and seq.num_computed_tokens < 8192:
        plan, ms = step(scheduler, machine, noise)
        assert plan.decodes >= 16, "every running sequence gets its token in every step"
        gaps.append(ms)
    gaps.sort()
    assert gaps[int(0.95 * len(gaps))] <= BOUND_MS, f"p95 of {len(gaps)} steps"
    if len(gaps) > 20:
        assert sum(gaps) / len(gaps) > 0.75 * BOUND_MS, "and the time there is gets used"


def test_many_short_prompts_at_once_share_the_time() -> None:
    scheduler = Scheduler(BlockManager(16, 20_000), SchedulerSettings(max_step_ms=BOUND_MS))
    noise = random.Random(1)
    decoding(scheduler, 16, laptop, noise)
    for number in range(100, 200):
        scheduler.add(Sequence(number, [number] * 20, arrival=1.0))
    taken = []
    for _ in range(40):
        plan, ms = step(scheduler, laptop, noise)
        taken.append(ms)
        assert len(plan.items) >= plan.decodes + 2, "several in a step"
        assert scheduler.num_running <= len(plan.items) + 1, "who is started gets something to do"
    assert sorted(taken)[37] <= BOUND_MS and max(taken) < 2 * BOUND_MS


def test_the_first_chunks_beside_decodes_are_small() -> None:
    scheduler = Scheduler(BlockManager(16, 20_000), SchedulerSettings(max_step_ms=inf))
    scheduler.add(Sequence(0, [1], SamplingParams(max_tokens=100)))
    noise = random.Random(1)
    step(scheduler, laptop, noise)
    scheduler.add(Sequence(1, [7] * 1000, arrival=1.0))
    chunks = [step(scheduler, laptop, noise)[0].chunk_tokens for _ in range(4)]
    assert chunks == [32, 64, 128, 256], "twice the largest that was measured"


def test_a_machine_that_gets_slow_is_noticed_within_a_few_steps() -> None:
    scheduler = Scheduler(BlockManager(16, 20_000), SchedulerSettings(max_step_ms=BOUND_MS))
    noise = random.Random(1)
    decoding(scheduler, 16, laptop, noise)
    scheduler.add(Sequence(99, [7] * 8192, arrival=1.0))
    for _ in range(20):
        step(scheduler, laptop, noise)
    gaps = [step(scheduler, slowed, noise)[1] for _ in range(30)]
    assert max(gaps[10:]) < 1.5 * BOUND_MS and sorted(gaps[10:])[18] <= 1.1 * BOUND_MS


def test_prompts_move_on_even_where_decodes_take_all_the_time() -> None:
    scheduler = Scheduler(BlockManager(16, 1000), SchedulerSettings(max_step_ms=1.0))
    noise = random.Random(1)
    decoding(scheduler, 4, laptop, noise)
    scheduler.add(Sequence(99, [7] * 90, arrival=1.0))
    for _ in range(10):
        plan, _ = step(scheduler, laptop, noise)
        assert plan.chunk_tokens == 8, "the least there is"


def test_without_decodes_a_chunk_takes_the_whole_budget() -> None:
    scheduler = Scheduler(
        BlockManager(16, 1000), SchedulerSettings(max_num_batched_tokens=512, max_step_ms=1.0)
    )
    scheduler.add(Sequence(0, [7] * 1000))
    assert step(scheduler, laptop, random.Random(1))[0].chunk_tokens == 512


def test_nothing_known_means_no_limit_and_no_time_means_no_tokens() -> None:
    speed = StepTime()
    assert speed.tokens_within(10.0, 0) == inf and speed.chunk_ms(0, 100) == 0
    plan = Plan([], 0, [], [], [], chunk_tokens=100, chunk_context=context_of(0, 100))
    for _ in range(200):
        speed.observe(plan, 50.0)
    assert speed.decode_ms(0, 0) + speed.chunk_ms(0, 100) == pytest.approx(50.0, rel=0.01)
    assert speed.tokens_within(-1.0, 0) == 0 and speed.tokens_within(inf, 0) == inf
    count = speed.tokens_within(20.0, 1000)
    assert speed.chunk_ms(1000, int(count)) <= 20.0 < speed.chunk_ms(1000, int(count) + 2)


def test_one_hiccup_changes_nothing() -> None:
    speed = StepTime()
    plan = Plan([], 0, [], [], [], chunk_tokens=100)
    for ms in (50.0, 50.0, 50.0, 500.0, 50.0):
        speed.observe(plan, ms)
    assert speed.chunk_ms(0, 100) + speed.decode_ms(0, 0) == pytest.approx(50.0)


def test_context_is_what_lies_before_each_token() -> None:
    assert context_of(10, 4) == 10 + 11 + 12 + 13
