"""How much of a prompt a step takes: what a chunk costs, what time there is, who gets it."""

from __future__ import annotations

from array import array
from math import inf
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tiny_llm.data import Advance, PlanItem, Sequence, StepCosts
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.sampling_params import PoolingParams, SamplingParams
from tiny_llm.scheduler.places import Place, StepPlan
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.scheduler.speed import StepTime, context_of, root_of

pytestmark = pytest.mark.chapter("2.10")

COSTS = StepCosts(step=20.0, decode=0.5, decode_context=0.001, chunk=0.1, chunk_context=0.0)
DEEP = COSTS._replace(chunk_context=1e-4)


def sure(costs: StepCosts = COSTS) -> StepTime:
    """Costs that are known: nothing is doubted, so that a guess is what it says."""
    speed = StepTime(costs)
    speed._doubts = [[0.0] * 5 for _ in range(5)]
    return speed


def planned(
    decodes: int = 4, tokens: int = 1000, most_ms: float = 50.0, costs: StepCosts = COSTS
) -> StepPlan:
    """A step of so many decodes, with a bound."""
    step = StepPlan(tokens, 100, 100)
    step.decodes = decodes
    step.limit_time(sure(costs), most_ms)
    return step


def item(tokens: int, start: int = 0, rows: int = 0) -> PlanItem:
    """A chunk."""
    return PlanItem(0, array("i", [1] * tokens), start, array("i"), rows)


@pytest.mark.parametrize(
    ("start", "tokens", "seen"), [(0, 0, 0), (0, 1, 0), (5, 1, 5), (3, 4, 18), (0, 512, 130_816), (100, 0, 0)]
)
def test_each_token_of_a_chunk_looks_back_on_all_before_it(start: int, tokens: int, seen: int) -> None:
    assert context_of(start, tokens) == seen, "not on itself: that is no context"


def test_context_is_counted_in_whole_numbers() -> None:
    found = context_of(2**53 + 1, 3)
    assert found == 3 * (2**53 + 1) + 3 and isinstance(found, int), "a float would lose the last digit"


@pytest.mark.parametrize("look", [0.0, 1e-18, 4e-6, 0.5])
@pytest.mark.parametrize("ms", [1e-3, 1.0, 50.0])
def test_so_many_tokens_take_that_time(look: float, ms: float) -> None:
    count = root_of(0.1, look, ms)
    assert 0.1 * count + look * count * count / 2 == pytest.approx(ms, rel=1e-9), (
        "the first one looks back on none"
    )


def test_no_time_is_no_tokens() -> None:
    assert root_of(0.1, 1e-3, 0.0) == 0.0 and root_of(0.0, 0.0, 0.0) == 0.0, "whatever a token costs"
    assert root_of(0.0, 0.5, 25.0) == pytest.approx(10.0), "where only the looking back costs"


def test_the_decodes_come_off_the_time() -> None:
    step = StepPlan(1000, 100, 100)
    step.decodes, step.drafted, step.decode_context = 3, 2, 1000
    step.limit_time(sure(), 50.0)
    assert step.bound_ms == pytest.approx(45.0), "of a step nine tenths are planned for"
    assert step.ms == pytest.approx(45.0 - (20.0 + 5 * 0.5 + 1.0)), (
        "guesses are rows, too, and context is read"
    )
    assert step.least_ms == pytest.approx(25.0), "half of the step"


def test_where_decodes_take_all_of_it_the_least_is_half_of_what_they_take() -> None:
    step = StepPlan(1000, 100, 100)
    step.decodes = 200
    step.limit_time(sure(), 50.0)
    assert step.ms == pytest.approx(45.0 - 120.0) and step.least_ms == pytest.approx(60.0)


def test_without_a_bound_there_is_no_end_of_time() -> None:
    step = StepPlan(1000, 100, 100)
    step.decodes = 4
    step.limit_time(sure(), inf)
    assert step.ms == step.bound_ms == inf and step.tokens_for(sure(), 0) == 1000


def test_a_chunk_is_as_large_as_the_time_that_is_left() -> None:
    found = planned().tokens_for(sure(), 0)
    assert found == 230 and isinstance(found, int), "45 - 20 - 4 * 0.5 = 23 ms, at 0.1 ms a token"
    assert planned(tokens=100).tokens_for(sure(), 0) == 100, "nor more than the budget's tokens"
    assert planned(tokens=0).tokens_for(sure(), 0) == 0
    odd = COSTS._replace(chunk=0.3)
    assert planned(costs=odd).tokens_for(sure(odd), 0) == 76, "23 / 0.3 = 76.7: the 77th would come too late"


def test_the_deeper_a_chunk_lies_the_smaller_it_is() -> None:
    step = planned(costs=DEEP)
    flat, deep = (step.tokens_for(sure(DEEP), start) for start in (0, 5000))
    assert 0.1 * flat + 1e-4 * context_of(0, flat) <= 23.0 < 0.1 * (flat + 2) + 1e-4 * context_of(0, flat + 2)
    assert deep == 38, "each looks back on 5,000 tokens: 0.6 ms"


def test_a_second_chunk_gets_what_the_first_one_left() -> None:
    step = planned()
    step.add_chunk(item(200), sure())
    assert step.tokens_for(sure(), 0) == 30, "230 in all"
    step.add_chunk(item(30), sure())
    assert step.tokens_for(sure(), 0) == 0, "only the first chunk always gets a few"


@pytest.mark.parametrize(("start", "few"), [(0, 8), (2_000_000, 1), (100_000, 5)])
def test_the_first_chunk_always_gets_a_few(start: int, few: int) -> None:
    step = planned(decodes=200, costs=DEEP)
    assert step.ms < 0 and step.tokens_for(sure(DEEP), start) == few, "eight, or what adds half, or one"
    assert step.has_room, "the first one may start though there is no time"
    step.add_chunk(item(1), sure(DEEP))
    assert not step.has_room and step.tokens_for(sure(DEEP), start) == 0


def test_a_little_time_is_used_up_even_where_a_few_would_be_less() -> None:
    assert planned(decodes=44).tokens_for(sure(), 0) == 30, "3 ms are more than eight tokens"
    assert planned(decodes=49).tokens_for(sure(), 0) == 8, "half a millisecond is less"


def test_of_two_ways_to_count_the_first_chunk_gets_the_larger() -> None:
    step = planned()
    fits = {step.bound_ms: 6.9, step.least_ms: 3.2}
    speed = cast(StepTime, SimpleNamespace(tokens_within=lambda ms, start, beside=(): fits[ms]))
    assert step.tokens_for(speed, 0) == 6, "3 at least, and there is time for 6"


def test_an_added_chunk_is_counted() -> None:
    step, speed = planned(tokens=500, costs=DEEP), sure(DEEP)
    left = step.ms
    step.add_chunk(item(100, start=50), speed)
    step.add_chunk(item(20, start=3), speed)
    assert [len(one.tokens) for one in step.items] == [100, 20]
    assert step.tokens == 380 and step.chunk_tokens == 120, "both chunks"
    seen = context_of(50, 100) + context_of(3, 20)
    assert step.chunk_context == seen and step.decodes == 4
    assert step.ms == pytest.approx(left - 0.1 * 120 - 1e-4 * seen)


def test_what_a_window_hides_costs_nothing() -> None:
    speed = sure(DEEP._replace(windows=((16, 1.0),)))
    step = planned()
    step.add_chunk(item(10, start=1000), speed)
    assert step.chunk_context == 150, "each of ten sees 15 before it"


class Given:
    """A scheduler that knows what steps take, and one sequence that has its room."""

    def __init__(self, length: int = 30, blocks: int = 200, window: int = 0, **more: Any) -> None:
        limits = SchedulerSettings(max_num_batched_tokens=1000, max_num_seqs=8, max_step_ms=50.0)
        self.scheduler = Scheduler(BlockManager(4, blocks, window=window), limits)
        self.scheduler.speed = sure()
        self.entry = self.add(0, length, **more)

    def add(self, number: int, length: int, **more: Any) -> Place:
        """A sequence that has begun."""
        more.setdefault("params", SamplingParams(max_tokens=16))
        tokens = array("i", range(100 * number, 100 * number + length))
        self.scheduler.add(Sequence(number, tokens, arrival=float(number), **more))
        entry = self.scheduler._entries[number]
        assert self.scheduler._start(entry)
        return entry

    def chunk(self, step: StepPlan, entry: Place | None = None) -> list[tuple[int, list[int], int, int]]:
        """Let it catch up: (sequence, tokens, start, logit rows) of each chunk."""
        self.scheduler._chunk(step, entry or self.entry)
        return [(one.seq_id, one.tokens.tolist(), one.start, one.logit_rows) for one in step.items]


def free(tokens: int = 1000) -> StepPlan:
    """A step without decodes."""
    return StepPlan(tokens, 8, 8)


def test_a_prompt_that_fits_is_one_chunk_with_a_row_of_logits() -> None:
    step = free()
    assert Given().chunk(step) == [(0, list(range(30)), 0, 1)]
    assert len(step.items[0].block_table) == 8 and step.tokens == 970, "others may still come in"


def test_a_prompt_is_cut_where_the_budget_ends() -> None:
    given, step = Given(), free(12)
    assert given.chunk(step) == [(0, list(range(12)), 0, 0)], "no logits in the middle"
    assert len(step.items[0].block_table) == 3, "the blocks of what is there then"
    given.entry.seq.num_computed_tokens = 12
    assert given.chunk(free(12)) == [(0, list(range(12, 24)), 12, 0)]
    given.entry.seq.num_computed_tokens = 24
    assert given.chunk(free(12)) == [(0, list(range(24, 30)), 24, 1)]


def test_the_time_cuts_it_too() -> None:
    step = planned(decodes=44)
    given = Given(length=100)
    assert given.chunk(step) == [(0, list(range(30)), 0, 0)] and step.tokens == 0, "3 ms are 30 tokens"


def test_who_is_cut_leaves_nothing_to_others() -> None:
    given, step = Given(length=100), planned()
    step.tokens = 60
    other = given.add(1, 5)
    given.chunk(step)
    assert step.tokens == 0 and not step.has_room and len(given.chunk(step, other)) == 1, (
        "what is left is a crumb"
    )
    step = planned(decodes=44)
    step.add_chunk(item(30), sure())
    step.ms = 1e-9
    given.chunk(step)
    assert len(step.items) == 1 and step.tokens == 0, "not a token fits: no item, and nobody else is asked"


def test_two_short_prompts_share_a_step() -> None:
    given, step = Given(length=5), free()
    other = given.add(1, 6)
    given.chunk(step)
    assert [one[0] for one in given.chunk(step, other)] == [0, 1]


def test_where_there_is_no_room_nothing_happens() -> None:
    given, step = Given(), free(0)
    given.scheduler.pins.join = None  # type: ignore[method-assign,assignment]
    assert given.chunk(step) == [], "nothing is joined for a step that it is not in"


def test_who_catches_up_behind_its_answer_gets_a_row_at_its_end() -> None:
    given = Given()
    given.entry.seq.tokens.extend([7, 8, 9])  # as after a preemption
    assert given.scheduler.blocks.reserve(given.entry.table, 0, 33)
    assert given.chunk(free())[0][2:] == (0, 1), "of its last token, wherever the prompt ended"
    assert given.chunk(free(30))[0][3] == 0, "the prompt's end is not its end"


def test_a_text_without_an_answer_gets_no_row() -> None:
    assert Given(params=PoolingParams()).chunk(free())[0][3] == 0


def test_a_window_s_room_ends_a_chunk() -> None:
    given = Given(length=60, window=8)
    given.entry.table.writable = 20
    assert len(given.chunk(free())[0][1]) == 20, "beyond it there is no block yet"


def test_what_is_joined_or_loaded_need_not_be_computed() -> None:
    given = Given()

    def join(seq: Sequence, table: object, joins: object) -> int:
        seq.num_computed_tokens += 8
        return 24

    given.scheduler.pins.join = join  # type: ignore[method-assign]
    assert given.chunk(free()) == [(0, list(range(8, 24)), 8, 0)], "up to where the next part begins"
    loaded = Given()
    loaded.scheduler.blocks.store = object()  # type: ignore[assignment]
    told: list[float] = []

    def load(entry: Place, ms: float) -> None:
        told.append(ms)
        entry.seq.num_computed_tokens = 16

    def after(seq: Sequence, table: object, joins: object) -> int:
        assert seq.num_computed_tokens == 16, "what is joined comes behind what is loaded"
        return 30

    loaded.scheduler.pins.join = after  # type: ignore[method-assign]
    loaded.scheduler._load = load  # type: ignore[method-assign]
    step = planned()
    assert loaded.chunk(step)[0][2] == 16 and told == [pytest.approx(23.0)], "there is so much time for it"


@pytest.mark.parametrize(("length", "taken"), [(30, 30), (300, 128)])
def test_a_prompt_that_is_scored_wants_all_its_rows(length: int, taken: int) -> None:
    given, step = Given(length=length, params=SamplingParams(max_tokens=4, prompt_logprobs=1)), free()
    ((_, tokens, _, rows),) = given.chunk(step)
    assert (len(tokens), rows) == (taken, taken), "128 rows of logits at most: they take memory"
    assert step.tokens == 0, "nobody else in this step, for the same reason"


def test_once_it_has_answered_nothing_is_scored_again() -> None:
    given, step = Given(length=300, params=SamplingParams(max_tokens=4, prompt_logprobs=1)), free()
    given.entry.seq.tokens.append(7)
    assert given.scheduler.blocks.reserve(given.entry.table, 0, 301)
    ((_, tokens, _, rows),) = given.chunk(step)
    assert (len(tokens), rows) == (301, 1) and step.tokens == 699


def gaps(bound: float, decodes: int) -> tuple[list[float], int]:
    """Milliseconds of each step while long prompts come beside decodes; and steps until all were read."""
    limits = SchedulerSettings(max_num_batched_tokens=4096, max_num_seqs=300, max_step_ms=bound)
    scheduler = Scheduler(BlockManager(16, 5000, prefix_cache=False), limits)
    scheduler.speed = sure(DEEP)
    for number in range(decodes):
        scheduler.add(Sequence(number, array("i", [1]), SamplingParams(max_tokens=10**4)))
    taken = list[float]()
    first = [decodes, decodes + 1]
    for now in range(2000):
        if now == 3:
            for number in first:
                scheduler.add(Sequence(number, array("i", [1] * 1500), SamplingParams(max_tokens=10**4)))
        plan = scheduler.schedule()
        scheduler.commit(plan, [Advance(one.seq_id, (1,)) for one in plan.items if one.logit_rows])
        work = plan.decodes, plan.decode_context, plan.chunk_tokens, plan.chunk_context
        taken.append(DEEP.step + sum(cost * count for cost, count in zip(DEEP[1:5], work, strict=True)))
        if now > 3 and plan.decodes == decodes + 2:
            return taken[3:], now - 3
    raise AssertionError("the prompts were never read")


@pytest.mark.parametrize("bound", [40.0, 80.0])
def test_no_gap_is_longer_than_the_bound(bound: float) -> None:
    taken, _ = gaps(bound, decodes=10)
    assert max(taken) <= bound and sum(taken[:-2]) / len(taken[:-2]) > 0.8 * bound, "and the time is used"


def test_prompts_are_read_even_where_decodes_take_all_the_time() -> None:
    taken, steps = gaps(40.0, decodes=60)
    assert max(taken) < 1.5 * 55 and steps < 500, "slowly, by a few tokens a step"


def test_without_a_bound_everybody_waits_for_the_prompt() -> None:
    taken, steps = gaps(inf, decodes=10)
    assert max(taken) > 300 and steps <= 2
