"""Who starts, and who makes room: each promise by hand, over the blocks that serve."""

from __future__ import annotations

from array import array
from math import inf
from typing import Any

import pytest

from tiny_llm.data import Advance, MovedPart, Plan, Sequence
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler.places import Place, StepPlan, rank_of
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import SchedulerSettings

pytestmark = pytest.mark.chapter("3.5")

SIZE = 4


def make(blocks: int = 100, *, host: int = 0, prefix_cache: bool = True, **limits: Any) -> Scheduler:
    """A scheduler over ``blocks`` blocks of 4 tokens."""
    manager = BlockManager(SIZE, blocks, host_blocks=host, prefix_cache=prefix_cache)
    return Scheduler(manager, SchedulerSettings(**limits))


def request(number: int, length: int = 8, most: int = 16, **more: Any) -> Sequence:
    """A prompt like no other's, that came ``number`` seconds after the start."""
    more.setdefault("arrival", float(number))
    return Sequence(number, array("i", [100 + number] * length), SamplingParams(max_tokens=most), **more)


def step(scheduler: Scheduler) -> Plan:
    """One step in which each sequence that is up to date gets a token."""
    plan = scheduler.schedule()
    scheduler.commit(plan, [Advance(item.seq_id, (1,)) for item in plan.items if item.logit_rows])
    scheduler.check_integrity()
    return plan


def those_in(plan: Plan) -> list[tuple[int, int]]:
    """(sequence, tokens) of each item."""
    return [(item.seq_id, len(item.tokens)) for item in plan.items]


def run_until_somebody_gives_way(scheduler: Scheduler) -> Plan:
    """Steps, up to the first in which a sequence made room."""
    for _ in range(100):
        if (plan := step(scheduler)).preempted:
            return plan
    pytest.fail("nobody ever made room")


def place(scheduler: Scheduler, number: int) -> Place:
    """What the scheduler notes of a sequence."""
    return scheduler._entries[number]


def state(scheduler: Scheduler, number: int) -> tuple[object, ...]:
    """All of a sequence and of the pool that a refused start must leave as it was."""
    entry, blocks = place(scheduler, number), scheduler.blocks
    one = entry.seq
    mine = one.status, one.num_computed_tokens, one.cached_tokens, [*entry.table.blocks]
    queued = [seq.id for seq in scheduler.waiting(9)]
    return *mine, blocks.available, scheduler.num_running, queued, entry in scheduler._patience._live


@pytest.mark.parametrize(
    ("arrival", "priority", "ageing_s", "expected"),
    [(3.25, 0, 10.0, 3.25), (3.25, 1, 10.0, -6.75), (50.0, 2, 7.5, 35.0), (3.0, -1, 10.0, 13.0)],
)
def test_a_level_is_worth_seconds_of_waiting(
    arrival: float, priority: int, ageing_s: float, expected: float
) -> None:
    seq = request(7, arrival=arrival, priority=priority)
    assert rank_of(seq, ageing_s) == (expected, 7), "smaller goes first: older, or more urgent"
    seq.num_computed_tokens, seq.status = 5, "running"
    seq.tokens.append(1)
    assert rank_of(seq, ageing_s) == (expected, 7), "a rank never changes"


def test_who_came_at_the_same_time_goes_by_number() -> None:
    first, second = request(3, arrival=1.0), request(12, arrival=1.0)
    assert rank_of(first, 1.0) < rank_of(second, 1.0), "numbers are compared, not their digits"
    assert rank_of(request(5, arrival=2.0), 1.0) > rank_of(request(9, arrival=1.0), 1.0), "time comes first"


def test_those_that_are_not_before_whom_it_is_asked_for_stay() -> None:
    scheduler = make()
    for number in range(4):
        scheduler.add(request(number))
    plan = StepPlan(100, 0, 10)
    scheduler._admit(plan, (1.0, 1))
    assert scheduler.num_running == 2 and [item.seq_id for item in plan.items] == [0, 1]
    scheduler._admit(plan, (inf, 0))
    assert scheduler.num_running == 4, "before the end of all, everybody is"


def test_of_those_that_came_together_the_number_says_who_is_before_whom() -> None:
    scheduler = make()
    for number in range(4):
        scheduler.add(request(number, arrival=1.0))
    scheduler._admit(StepPlan(100, 0, 10), (1.0, 1))
    assert scheduler.num_running == 2, "a rank is both, the time and the number"


def test_who_runs_out_of_items_starts_nobody() -> None:
    scheduler = make()
    for number in range(4):
        scheduler.add(request(number))
    scheduler._admit(plan := StepPlan(100, 0, 2), (inf, 0))
    assert len(plan.items) == scheduler.num_running == 2, "a plan of two items has room for two"


def test_no_more_run_than_may() -> None:
    scheduler = make(max_num_seqs=2)
    for number in range(4):
        scheduler.add(request(number))
    scheduler._admit(StepPlan(100, 0, 10), (inf, 0))
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 2), "whatever room the step has"


def test_all_start_at_once_for_whom_there_is_room() -> None:
    scheduler = make(max_num_seqs=3)
    for number in range(5):
        scheduler.add(request(number))
    assert those_in(step(scheduler)) == [(0, 8), (1, 8), (2, 8)], "as many as may run, in one step"
    assert scheduler.num_waiting == 2
    scheduler.cancel(1)
    assert those_in(step(scheduler)) == [(0, 1), (2, 1), (3, 8)], "a place is free"


def test_nobody_is_overtaken_for_its_size() -> None:
    scheduler = make(blocks=10)
    scheduler.add(request(0, length=24))
    step(scheduler)
    scheduler.add(request(1, length=20))
    scheduler.add(request(2, length=1, most=1))
    assert those_in(step(scheduler)) == [(0, 1)], "there is room for 2, which came after 1"
    scheduler.cancel(0)
    assert those_in(step(scheduler)) == [(1, 20), (2, 1)]


def test_nobody_starts_for_whom_the_step_has_no_token() -> None:
    scheduler = make(max_num_batched_tokens=8, max_num_seqs=8)
    for number in range(3):
        scheduler.add(request(number, length=8))
    assert those_in(step(scheduler)) == [(0, 8)]
    assert scheduler.num_running == 1 and scheduler.usage().used == 2, "who waits holds no blocks"


def test_who_waits_and_is_more_urgent_reads_before_who_runs() -> None:
    scheduler = make(max_num_batched_tokens=8, max_num_seqs=4)
    scheduler.add(request(0, length=24, arrival=0.0))
    step(scheduler)
    scheduler.add(request(1, length=24, arrival=1.0))
    scheduler.add(request(2, length=6, arrival=2.0, priority=1))
    assert those_in(step(scheduler)) == [(2, 6), (0, 2)], "2 is as old as one that came at -8 s, 1 waits"
    assert scheduler.num_running == 2


def test_who_starts_has_its_blocks_and_its_place() -> None:
    scheduler = make(prefix_cache=False)
    scheduler.add(request(0, length=9))
    entry = place(scheduler, 0)
    assert scheduler._start(entry) is True
    assert len(entry.table.blocks) == 3 and entry.seq.status == "running"
    assert scheduler.running() == [(entry.seq, entry.table)] and scheduler.waiting(9) == []
    assert (entry.seq.num_computed_tokens, entry.seq.cached_tokens) == (0, 0)


def test_a_block_is_left_for_each_that_runs() -> None:
    scheduler = make(blocks=8, prefix_cache=False)
    for number, length in ((0, 8), (1, 8), (2, 12)):
        scheduler.add(request(number, length=length, most=2))
    assert scheduler._start(place(scheduler, 0)) and scheduler._start(place(scheduler, 1))
    before = state(scheduler, 2)
    assert not scheduler._start(place(scheduler, 2)), "of four blocks it takes three, and two run"
    assert state(scheduler, 2) == before, "no room: nothing changes"
    assert [output.seq_id for output in scheduler.expire(inf)][-1:] == [2], "and it may still wait too long"
    roomy = make(blocks=9, prefix_cache=False)
    for number, length in ((0, 8), (1, 8), (2, 12)):
        roomy.add(request(number, length=length, most=2))
        assert roomy._start(place(roomy, number)), "of five, it leaves the two"


def test_a_model_with_a_window_asks_for_what_the_next_step_needs() -> None:
    scheduler = Scheduler(BlockManager(SIZE, 50, window=8), SchedulerSettings(4, 16))
    scheduler.add(request(0, length=100))
    assert scheduler._start(place(scheduler, 0))
    assert len(place(scheduler, 0).table.blocks) == 16 // SIZE, "a step has sixteen tokens"


def test_the_first_one_may_take_all_there_is() -> None:
    scheduler = make(blocks=5)
    scheduler.add(request(0, length=20, most=1))
    assert those_in(step(scheduler)) == [(0, 20)]


def test_no_table_is_looked_at_until_more_blocks_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(blocks=10, prefix_cache=False)
    scheduler.add(request(0, length=12))
    scheduler.add(request(1, length=32, most=1))
    step(scheduler)
    asked, allocate = list[int](), scheduler.blocks.allocate

    def watched(*given: Any, **more: Any) -> int | None:
        asked.append(scheduler.blocks.available)
        return allocate(*given, **more)

    monkeypatch.setattr(scheduler.blocks, "allocate", watched)
    assert not scheduler._start(place(scheduler, 1)), "as many are there as before"
    for _ in range(9):
        step(scheduler)
    assert asked == [], "there was no room, and since then blocks only went: the same answer, unasked"
    assert place(scheduler, 1).blocked_at == 7, "as many were there when there was no room"
    scheduler.cancel(0)
    assert those_in(step(scheduler)) == [(1, 32)] and asked == [10]


def test_one_block_more_is_worth_asking_again() -> None:
    scheduler = make(blocks=10, prefix_cache=False)
    for number, length in ((0, 4), (1, 4), (2, 27)):
        scheduler.add(request(number, length=length, most=2))
    assert all(scheduler._start(place(scheduler, number)) for number in (0, 1))
    assert not scheduler._start(place(scheduler, 2)), "seven of eight, and two that run"
    scheduler.cancel(1)
    assert scheduler._start(place(scheduler, 2)), "seven of nine, and one that runs"


def test_alone_one_is_asked_again_though_no_more_are_there() -> None:
    scheduler = make(blocks=10, prefix_cache=False)
    scheduler.add(request(0, length=40, most=1))
    entry = place(scheduler, 0)
    entry.blocked_at = scheduler.blocks.available
    assert scheduler._start(entry), "with nobody beside it, it needs no block to spare"


def test_what_is_found_need_not_be_computed() -> None:
    scheduler = make()
    scheduler.add(request(0, length=10, most=1))
    step(scheduler)
    scheduler.commit(plan := scheduler.schedule(), [Advance(0, (1,), "length")] * len(plan.items))
    again = Sequence(5, array("i", [100] * 10 + [7, 8]), SamplingParams(max_tokens=4))
    scheduler.add(again)
    assert scheduler._start(place(scheduler, 5))
    assert again.num_computed_tokens == again.cached_tokens == 10
    cache = scheduler.blocks.prefix
    assert cache is not None and (cache.hit_tokens, cache.miss_tokens) == (10, 10 + 2)


def test_what_a_request_found_is_counted_once() -> None:
    scheduler = make(blocks=6)
    for number in range(2):
        scheduler.add(request(number, length=7, most=16))
    run_until_somebody_gives_way(scheduler)
    cache, one = scheduler.blocks.prefix, scheduler.sequence(1)
    assert cache is not None and (cache.hit_tokens, cache.miss_tokens) == (0, 14)
    scheduler.cancel(0)
    (item,) = step(scheduler).items
    assert one is not None and item.seq_id == 1 and item.start > 0, "it found its own blocks again"
    assert one.cached_tokens == 0, "its first start found nothing, and only that one counts"
    assert (cache.hit_tokens, cache.miss_tokens) == (0, 14)


def test_who_has_started_has_no_end_to_its_patience() -> None:
    scheduler = make(blocks=6, max_wait_s=30.0)
    for number in range(2):
        scheduler.add(request(number, length=7, most=16, arrival=0.0))
    run_until_somebody_gives_way(scheduler)
    assert scheduler.expire(100.0) == [], "both had their first step in time"


def test_who_is_joined_of_pinned_parts_waits_for_them() -> None:
    scheduler = make()
    joined = request(1, length=12, parts=(MovedPart(0, 8, 77, 0),), arrival=0.0)
    scheduler.add(joined)
    before = state(scheduler, 1)
    assert not scheduler._start(place(scheduler, 1)), "nothing is pinned as 77"
    assert state(scheduler, 1) == before
    scheduler.cancel(1)
    scheduler.add(request(0, length=8, most=1, pin=(77, 8)))
    step(scheduler)
    scheduler.cancel(0)
    assert 77 in scheduler.pins
    scheduler.add(again := request(2, length=12, parts=(MovedPart(0, 8, 77, 0),)))
    assert scheduler._start(place(scheduler, 2))
    assert again.num_computed_tokens == 0 and again.cached_tokens == 8, "a part that is moved is spared, too"


def test_the_last_in_rank_makes_room_whoever_asks() -> None:
    scheduler = make(blocks=6, max_num_seqs=3)
    for number, priority in ((0, -1), (1, 0), (2, 0)):
        scheduler.add(request(number, length=4, most=12, priority=priority, arrival=0.0))
    plan = run_until_somebody_gives_way(scheduler)
    assert plan.preempted == [(0, False)], "0 is the least urgent, though its number is the first"
    assert [seq_id for seq_id, _ in those_in(plan)] == [1, 2]


@pytest.mark.parametrize(("blocks", "gone"), [(5, []), (6, [2]), (7, [2, 1])])
def test_as_many_make_room_as_it_takes(blocks: int, gone: list[int]) -> None:
    scheduler = make(blocks=7, prefix_cache=False, max_num_seqs=4)
    for number in range(3):
        scheduler.add(request(number, length=4, most=3))
    assert all(scheduler._start(place(scheduler, number)) for number in range(3))
    plan = StepPlan(100, 9, 9)
    assert scheduler._make_room(place(scheduler, 0), blocks * SIZE, plan) is True
    assert plan.preempted == [(number, False) for number in gone], "four are free, and each gives one more"
    assert len(place(scheduler, 0).table.blocks) == blocks and scheduler.num_running == 3 - len(gone)


def test_nobody_makes_room_where_there_is_some() -> None:
    scheduler = make(blocks=4, prefix_cache=False)
    for number in range(2):
        scheduler.add(request(number, length=4, most=4))
    assert all(scheduler._start(place(scheduler, number)) for number in range(2))
    assert scheduler._make_room(place(scheduler, 0), 8, plan := StepPlan(100, 9, 9)) is True
    assert scheduler._make_room(place(scheduler, 1), 8, plan) is True, "the last blocks are there to be used"
    assert plan.preempted == [] and scheduler.blocks.available == 0


def test_who_is_last_itself_has_to_go() -> None:
    scheduler = make(blocks=4, prefix_cache=False)
    for number in range(2):
        scheduler.add(request(number, length=4, most=12))
    assert all(scheduler._start(place(scheduler, number)) for number in range(2))
    last, plan = place(scheduler, 1), StepPlan(100, 9, 9)
    assert scheduler._make_room(last, 4 * SIZE, plan) is False, "nobody of a better rank gives way"
    assert plan.preempted == [(1, False)] and last.seq.status == "waiting" and not last.table.blocks
    assert place(scheduler, 0).seq.status == "running"


def test_who_is_in_a_step_under_way_keeps_its_blocks() -> None:
    scheduler = make(blocks=6, prefix_cache=False)
    for number in range(3):
        scheduler.add(request(number, length=4, most=8))
    first = scheduler.schedule()
    busy = Plan(first.items[2:], 6, [], [], [])
    plan = StepPlan(100, 9, 9, [busy])
    assert scheduler._make_room(place(scheduler, 0), 5 * SIZE, plan) is True
    assert plan.preempted == [(1, False)], "2 is last, but the other step is reading what it has"


def test_no_room_is_asked_for_from_where_it_does_not_write(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(blocks=9)
    scheduler.add(request(0, length=10, most=4))
    step(scheduler)
    asked, reserve = list[tuple[int, int]](), scheduler.blocks.reserve

    def watched(table: Any, start: int, end: int) -> bool:
        asked.append((start, end))
        return reserve(table, start, end)

    monkeypatch.setattr(scheduler.blocks, "reserve", watched)
    assert scheduler._make_room(place(scheduler, 0), 13, StepPlan(100, 9, 9))
    assert asked == [(10, 13)], "from the first token that is not computed"


def given_way(**settings: Any) -> tuple[Scheduler, Sequence, StepPlan]:
    """Of two with ten computed tokens each the second has made room."""
    scheduler = make(**settings)
    for number in range(2):
        scheduler.add(request(number, length=10, most=8))
    step(scheduler)
    scheduler._give_way(place(scheduler, 1), plan := StepPlan(100, 9, 9))
    scheduler.check_integrity()
    seq = scheduler.sequence(1)
    assert seq is not None
    return scheduler, seq, plan


def test_who_gives_way_waits_with_all_its_tokens() -> None:
    scheduler, seq, plan = given_way(preemption="recompute")
    assert plan.preempted == [(1, False)] and scheduler.preempted == {"recompute": 1, "swap": 0}
    assert (seq.status, seq.num_computed_tokens, len(seq.tokens)) == ("waiting", 0, 11)
    assert scheduler.waiting(9) == [seq] and [one.id for one, _ in scheduler.running()] == [0]
    assert not place(scheduler, 1).table.blocks


def test_what_was_computed_is_found_again_if_nobody_took_it() -> None:
    scheduler, seq, _ = given_way(preemption="recompute")
    assert len(scheduler.blocks.cached_blocks) == 3, "two full blocks and one that is begun"
    assert scheduler._start(place(scheduler, 1)) and seq.num_computed_tokens == 10


def test_who_goes_to_the_host_keeps_what_is_computed() -> None:
    scheduler, seq, plan = given_way(preemption="swap", host=8)
    assert plan.preempted == [(1, True)] and scheduler.preempted == {"recompute": 0, "swap": 1}
    assert (seq.status, seq.num_computed_tokens) == ("waiting", 10)
    table = place(scheduler, 1).table
    assert (len(table.host), table.host_tokens, len(table.blocks)) == (3, 10, 0), "ten tokens, three blocks"
    assert scheduler._start(place(scheduler, 1)) and seq.num_computed_tokens == 10


def test_where_the_host_is_full_it_is_computed_again() -> None:
    scheduler, seq, plan = given_way(preemption="swap", host=2)
    assert plan.preempted == [(1, False)] and scheduler.preempted == {"recompute": 1, "swap": 0}
    assert seq.num_computed_tokens == 0


@pytest.mark.parametrize(("swap_ms", "swapped"), [(0.001, True), (1e6, False)])
def test_the_cheaper_way_is_taken(swap_ms: float, swapped: bool) -> None:
    scheduler, _, plan = given_way(preemption="auto", host=8, swap_ms_per_block=swap_ms)
    assert plan.preempted == [(1, swapped)]
    assert len(scheduler.blocks.drain().swap_out) == (3 if swapped else 0), "nothing moves for nothing"


def test_who_gave_way_goes_on_before_who_came_later() -> None:
    scheduler = make(blocks=5, max_num_seqs=2)
    for number in range(2):
        scheduler.add(request(number, length=7, most=10))
    run_until_somebody_gives_way(scheduler)
    scheduler.add(request(2, length=1, most=1))
    assert [seq_id for seq_id, _ in those_in(step(scheduler))] == [0], "2 fits, but 1 comes first"
    scheduler.cancel(0)
    assert [seq_id for seq_id, _ in those_in(step(scheduler))] == [1, 2]


def test_what_it_was_refused_before_says_nothing_now() -> None:
    scheduler = make()
    for number in range(2):
        scheduler.add(request(number, length=10, most=8))
    step(scheduler)
    place(scheduler, 1).blocked_at = scheduler.blocks.available + 50  # when it waited for its first step
    scheduler._give_way(place(scheduler, 1), StepPlan(100, 9, 9))
    assert scheduler._start(place(scheduler, 1)), "it waits anew"


def test_a_token_that_was_not_computed_is_not_found() -> None:
    scheduler, seq, _ = given_way(preemption="recompute")
    like_it = Sequence(5, seq.tokens + array("i", [9]), SamplingParams(max_tokens=4))
    scheduler.add(like_it)
    assert scheduler._start(place(scheduler, 5)) and like_it.num_computed_tokens == 10, "no key yet"


def test_who_is_held_is_in_no_queue() -> None:
    scheduler = make(blocks=20)
    for number in range(2):
        scheduler.add(request(number, length=8))
    plan = scheduler.schedule()
    scheduler.commit(plan, [Advance(0, (1,)), Advance(1, ())])
    assert place(scheduler, 1).held, "its next token depends on others"
    scheduler._give_way(place(scheduler, 1), StepPlan(100, 9, 9))
    scheduler.check_integrity()
    assert scheduler.waiting(9) == [], "it may not start before they are as far"
    scheduler.commit(Plan([], 20, [], [], []), [], [Advance(1, (5,))])
    assert [one.id for one in scheduler.waiting(9)] == [1]
