"""The guess of a step's time: learnt from steps alone, and safe to plan by, whatever model and machine.

No clock is read: each machine here is a formula for the milliseconds of a step.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from dataclasses import replace
from itertools import count, pairwise
from math import ceil, inf
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_llm.data import Advance, Plan, Sequence
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.scheduler.speed import UNKNOWN_MODEL, StepTime, context_of

BOUND_MS = 100.0
LEAST = 8
"""Tokens that a chunk may have where decodes alone take longer than the bound."""
LOOK = 1.2e-4
"""What a token of context is to a chunk's token: Qwen2-0.5B's operations."""
Machine = Callable[[Plan], float]


def even(decode: float, token: float, look: float = LOOK) -> Machine:
    """Each part adds what it takes; almost all of a decode is reading the weights."""

    def ms(plan: Plan) -> float:
        context = 1e-5 * decode * plan.decode_context + look * token * plan.chunk_context
        return 0.95 * decode + 0.05 * decode * plan.decodes + token * plan.chunk_tokens + context

    return ms


def attentive(decode: float, token: float) -> Machine:
    """Attention is four times as slow as its operations say."""
    return even(decode, token, 4 * LOOK)


def hidden(decode: float, token: float) -> Machine:
    """A graphics card: arithmetic costs nothing until it takes longer than reading the weights."""

    def ms(plan: Plan) -> float:
        arithmetic = token * (plan.decodes + plan.chunk_tokens)
        return max(decode, arithmetic) + LOOK * token * plan.chunk_context

    return ms


def small_is_dear(decode: float, token: float) -> Machine:
    """The first rows cost three times as much as those of a large product."""

    def ms(plan: Plan) -> float:
        rows = plan.decodes + plan.chunk_tokens
        return decode + token * min(3 * rows, rows + 16) + LOOK * token * plan.chunk_context

    return ms


def in_tiles(decode: float, token: float) -> Machine:
    """Rows are computed by sixteen, however few there are."""

    def ms(plan: Plan) -> float:
        rows = 16 * ceil((plan.decodes + plan.chunk_tokens) / 16)
        return decode + token * (rows + plan.chunk_tokens) / 2 + LOOK * token * plan.chunk_context

    return ms


MACHINES = (even, attentive, hidden, small_is_dear, in_tiles)


class Chance(NamedTuple):
    """What measured times are off by: ``noise`` of each, ``cold`` times too long the first one."""

    noise: float = 0.0
    cold: float = 1.0


QUIET = Chance()


class Gap(NamedTuple):
    """A step in which others decoded while a prompt was read: its time, and that of its decodes alone."""

    ms: float
    alone_ms: float
    tokens: int
    least_ms: float


class World:
    """A scheduler on a machine. ``gaps`` has the steps in which decodes had to wait for chunks."""

    def __init__(self, machine: Machine, bound: float, chance: Chance = QUIET, tokens: int = 2048) -> None:
        limits = SchedulerSettings(max_step_ms=bound, max_num_batched_tokens=tokens)
        self.scheduler = Scheduler(BlockManager(16, 20_000), limits)
        self.machine = machine
        self.bound = bound
        self.gaps: list[Gap] = []
        self._chance = chance
        self._drawn = random.Random(1)
        self._numbers = count()

    def ask(self, length: int, most: int = 10_000) -> Sequence:
        """A request with a prompt like no other's."""
        number = next(self._numbers)
        params = SamplingParams(max_tokens=most)
        seq = Sequence(number, array("i", [number] * length), params, arrival=float(number))
        self.scheduler.add(seq)
        return seq

    def step(self, times: float = 1.0) -> Plan:
        """One step, which takes ``times`` as long as it should."""
        plan = self.scheduler.schedule()
        ms = self.machine(plan)
        advances = [self._advance(item.seq_id) for item in plan.items if item.logit_rows]
        self.scheduler.commit(plan, advances)
        noise = self._drawn.uniform(-self._chance.noise, self._chance.noise)
        self.scheduler.speed.observe(plan, ms * times * (1 + noise) * self._chance.cold)
        self._chance = self._chance._replace(cold=1.0)
        if plan.decodes and plan.chunk_tokens:
            alone = replace(plan, chunk_tokens=0, chunk_context=0)
            few = LEAST if self.machine(alone) >= self.bound else 1
            start = plan.items[plan.decodes].start
            least = replace(plan, chunk_tokens=few, chunk_context=context_of(start, few))
            self.gaps.append(Gap(ms, self.machine(alone), plan.chunk_tokens, self.machine(least)))
        return plan

    def read(self, length: int, most_steps: int = 10_000) -> list[Plan]:
        """Take in a prompt and a short answer, as far as they get in ``most_steps``."""
        seq, plans = self.ask(length, most=3), []
        while seq.status != "finished" and len(plans) < most_steps:
            plans.append(self.step())
        if seq.status != "finished":
            self.scheduler.cancel(seq.id)
        return plans

    def check(self, first: float = 2.0, others: float = 1.5) -> None:
        """No gap is longer than so many times the bound, but for what the least progress takes."""
        for i, gap in enumerate(self.gaps):
            times = others if i else first
            allowed = max(times * self.bound, 1.01 * gap.least_ms)
            assert gap.ms <= allowed, (
                f"gap {i}: {gap.ms:.0f} ms where {self.bound:g} are wanted, with a chunk of {gap.tokens} "
                f"tokens; the decodes alone take {gap.alone_ms:.0f} ms"
            )

    def _advance(self, seq_id: int) -> Advance:
        seq = self.scheduler.sequence(seq_id)
        assert seq is not None
        is_last = len(seq.tokens) + 1 - seq.prompt_len >= seq.params.max_tokens
        return Advance(seq_id, (1,), "length" if is_last else None)


def busy(world: World, first: int, decodes: int = 5, steps: int = 100) -> None:
    """One stream decodes; prompts of 2,000 join one by one; then twelve together, and a long one."""
    stream = world.ask(first)
    while stream.num_computed_tokens < first:
        world.step()
    for _ in range(decodes):
        world.step()
    for _ in range(3):
        world.read(2000, steps)
        for _ in range(decodes):
            world.step()
    for _ in range(12):
        world.ask(200, most=20)
    for _ in range(40):
        world.step()
    world.read(8000, steps)
    world.read(2000, steps)


@pytest.mark.parametrize("bound", [100.0, 300.0, 1000.0])
def test_prompts_of_2000_beside_a_stream_of_45_ms_a_token(bound: float) -> None:
    """Two gaps of 8,245 ms came of a bound of 1,000, and two more at each new prompt."""
    world = World(even(45.0, 4.0), bound, Chance(noise=0.05))
    busy(world, first=20, decodes=20, steps=10_000)
    world.check()
    reached = [gap for gap in world.gaps if gap.alone_ms < 0.7 * bound]
    mean = sum(gap.ms for gap in reached) / len(reached)
    assert mean > 0.65 * bound, "and the time there is gets used"


@pytest.mark.slow
@pytest.mark.parametrize("decode", [1.0, 10.0, 45.0, 150.0, 1000.0])
@pytest.mark.parametrize("machine", MACHINES)
def test_no_gap_is_much_longer_than_the_bound(machine: Callable[..., Machine], decode: float) -> None:
    shares = {
        1.0: (0.003, 0.4),
        10.0: (0.03, 1.0),
        45.0: (0.01, 0.09),
        150.0: (0.09, 0.4),
        1000.0: (0.03, 0.1),
    }
    for share in shares[decode]:
        for bound in (100.0, 300.0, 1000.0):
            world = World(machine(decode, share * decode), bound, Chance(noise=0.03))
            busy(world, first=20, steps=50)
            world.check()


@pytest.mark.slow
@settings(max_examples=40)
@given(
    machine=st.sampled_from(MACHINES),
    decode=st.sampled_from([1.0, 3.0, 9.0, 30.0, 70.0, 200.0, 500.0, 1000.0]),
    share=st.sampled_from([0.003, 0.01, 0.03, 0.1, 0.3, 1.0]),
    bound=st.sampled_from([30.0, 100.0, 300.0, 1000.0]),
    first=st.sampled_from([1, 20, 500, 2048]),
    decodes=st.integers(1, 30),
    noise=st.sampled_from([0.0, 0.03, 0.1]),
    cold=st.sampled_from([1.0, 3.0, 20.0]),
)
def test_whatever_the_model_and_its_first_step(
    machine: Callable[..., Machine],
    decode: float,
    share: float,
    bound: float,
    first: int,
    decodes: int,
    noise: float,
    cold: float,
) -> None:
    world = World(machine(decode, share * decode), bound, Chance(noise, cold))
    busy(world, first, decodes, steps=40)
    world.check()


def test_a_prompt_that_is_found_to_its_end_costs_its_attention() -> None:
    """A chunk after a long prefix looks back on all of it, though the step before had no such chunk."""
    world = World(attentive(45.0, 4.0), 300.0)
    world.ask(20)
    world.read(2000)
    shared = array("i", [77] * 8000)
    for number, more in ((1000, 0), (1001, 500)):
        tokens = shared + array("i", [number] * more)
        seq = Sequence(number, tokens, SamplingParams(max_tokens=3), arrival=float(number))
        world.scheduler.add(seq)
        while seq.status != "finished":
            world.step()
        world.read(500)
    assert seq.cached_tokens > 7900
    world.check()


def test_many_short_prompts_at_once_share_the_time() -> None:
    world = World(even(17.0, 1.4), BOUND_MS, Chance(noise=0.05))
    world.ask(100)
    world.read(2000)
    for _ in range(100):
        world.ask(20)
    world.gaps.clear()
    chunks = []
    for _ in range(20):
        plan = world.step()
        chunks.append(len(plan.items) - plan.decodes)
        assert world.scheduler.num_running <= len(plan.items) + 1, "who is started gets something to do"
    assert min(chunks) >= 1 and sum(chunks[10:]) >= 15, f"several in a step: {chunks}"
    world.check(first=1.5)


def test_the_first_chunks_beside_decodes_are_small() -> None:
    world = World(even(10.0, 0.1), BOUND_MS)
    world.ask(1)
    world.step()
    chunks = [plan.chunk_tokens for plan in world.read(2000)]
    assert chunks[0] < 10 and all(after <= 5 * before for before, after in pairwise(chunks))
    assert max(chunks) > 400, "and then as large as time allows"


def test_without_a_bound_a_prompt_is_read_in_one_step() -> None:
    world = World(even(10.0, 1.0), inf)
    world.ask(1)
    world.step()
    assert world.read(1000)[0].chunk_tokens == 1000


@pytest.mark.parametrize("times", [0.25, 2.0, 4.0])
def test_a_machine_that_changes_is_noticed_within_a_few_steps(times: float) -> None:
    world = World(even(17.0, 1.4), BOUND_MS, Chance(noise=0.05))
    world.ask(100)
    world.step()
    world.read(8000)
    before = world.gaps[-2].ms
    world.machine = even(17.0 * times, 1.4 * times)
    world.gaps.clear()
    world.read(8000)
    late = world.gaps[10:-1]
    assert max(gap.ms for gap in late) < 1.2 * BOUND_MS
    assert min(gap.ms for gap in late[10:]) > 0.7 * before, "and the time there is gets used again"


@pytest.mark.parametrize("times", [3.0, 30.0])
def test_a_hiccup_does_not_starve_prompts_for_long(times: float) -> None:
    world = World(even(45.0, 4.0), 300.0)
    world.ask(20)
    world.step()
    world.read(1500)
    usual = world.gaps[-2].tokens
    world.ask(4000)
    for _ in range(10):
        world.step()
    world.step(times)
    after = [world.step().chunk_tokens for _ in range(12)]
    assert min(after) >= LEAST, after
    assert after[-1] > 0.7 * usual, f"{usual} tokens before, then {after}"


@pytest.mark.parametrize("cold", [10.0, 100.0])
def test_a_cold_first_step_is_forgotten_soon(cold: float) -> None:
    world = World(even(45.0, 4.0), 300.0, Chance(cold=cold))
    world.ask(20)
    for _ in range(15):
        world.step()
    chunks = [plan.chunk_tokens for plan in world.read(2000)]
    assert max(chunks[:15]) > 40, f"of about 55 that fit: {chunks}"


def test_prompts_move_on_even_where_decodes_take_all_the_time() -> None:
    world = World(even(10.0, 0.3), 1.0)
    world.ask(100)
    for _ in range(5):
        world.step()
    chunks = [plan.chunk_tokens for plan in world.read(200)]
    assert chunks[0] >= 1 and set(chunks[8:20]) == {LEAST}, "the least there is"


def test_without_decodes_a_chunk_takes_the_whole_budget() -> None:
    world = World(even(10.0, 1.0), 1.0, tokens=512)
    world.ask(1000)
    assert world.step().chunk_tokens == 512


def test_what_is_measured_again_and_again_is_what_is_guessed() -> None:
    speed = StepTime()
    plan = Plan([], 0, [], [], [], chunk_tokens=100, chunk_context=context_of(0, 100))
    for _ in range(50):
        speed.observe(plan, 50.0)
    assert speed.decode_ms(0, 0) <= 50.0
    assert speed.tokens_within(-1.0, 0) == 0 and speed.tokens_within(inf, 0) == inf
    fits = speed.tokens_within(20.0, 1000)
    assert speed.chunk_ms(1000, int(fits)) <= 20.0 < speed.chunk_ms(1000, int(fits) + 2)


def test_context_is_what_lies_before_each_token() -> None:
    assert context_of(10, 4) == 10 + 11 + 12 + 13


def test_what_a_window_hides_is_no_context() -> None:
    half = StepTime(UNKNOWN_MODEL._replace(windows=((12, 0.5),)))
    assert half.context(3, 4) == context_of(3, 4) and half.context(10, 4) == 10 + 11 + 11.5 + 12 - 0.5
    world = World(even(17.0, 1.4), BOUND_MS)
    world.scheduler.speed = StepTime(UNKNOWN_MODEL._replace(windows=((100, 1.0),)))
    plans = world.read(3000)
    assert plans[-1].decode_context == 99 and plans[1].chunk_context == plans[1].chunk_tokens * 99


def test_a_deep_prompt_beside_streams_gets_the_time_that_there_is() -> None:
    """A token at 30,000 costs eight times what the first one did. Once each part's doubt was added up."""
    world = World(even(16.0, 1.4, 2.4e-4), BOUND_MS, Chance(noise=0.05))
    for _ in range(4):
        world.ask(256)
    for _ in range(30):
        world.step()
    world.gaps.clear()
    plans = world.read(32_000)
    world.check()
    deep = world.gaps[-500:]
    assert sum(gap.ms for gap in deep) / len(deep) > 0.75 * BOUND_MS
    assert len(plans) < 3700
