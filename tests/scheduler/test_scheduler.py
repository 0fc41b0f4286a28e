"""What the scheduler promises, one promise a test; random traffic is in test_traffic.py."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from math import inf
from typing import Any

import pytest

from tiny_llm.data import Advance, Output, Plan, PlanItem, Sequence
from tiny_llm.errors import BusyError, CapacityError, ConfigError, RequestError
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import SchedulerSettings

SIZE = 4
Make = Callable[..., Scheduler]


def make(blocks: int = 100, *, host: int = 0, **limits: Any) -> Scheduler:
    """A scheduler over a pool of ``blocks`` blocks of 4 tokens."""
    return Scheduler(BlockManager(SIZE, blocks, host_blocks=host), SchedulerSettings(**limits))


def request(number: int, length: int = 8, most: int = 16, **more: Any) -> Sequence:
    """A prompt like no other's, that came ``number`` seconds after the start."""
    more.setdefault("arrival", float(number))
    return Sequence(number, [100 + number] * length, SamplingParams(max_tokens=most), **more)


def step(scheduler: Scheduler, token: int = 1) -> Plan:
    """One step in which each sequence that is up to date gets ``token``."""
    plan = scheduler.schedule()
    scheduler.commit(plan, [Advance(item.seq_id, (token,)) for item in plan.items if item.logit_rows])
    scheduler.check_integrity()
    return plan


def shape(plan: Plan) -> list[tuple[int, int, int]]:
    """(sequence, tokens, logit rows) of each item."""
    return [(item.seq_id, len(item.tokens), item.logit_rows) for item in plan.items]


def test_a_prompt_is_taken_in_by_chunks_beside_decodes() -> None:
    scheduler = make(max_num_batched_tokens=8, max_num_seqs=4)
    scheduler.add(request(0, length=4))
    assert shape(step(scheduler)) == [(0, 4, 1)]
    scheduler.add(request(1, length=18))
    plans = [shape(step(scheduler)) for _ in range(4)]
    assert plans == [
        [(0, 1, 1), (1, 7, 0)],
        [(0, 1, 1), (1, 7, 0)],
        [(0, 1, 1), (1, 4, 1)],
        [(0, 1, 1), (1, 1, 1)],
    ]


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = make(blocks=10)
    scheduler.add(request(0, length=20, most=21))  # its last token is never computed
    with pytest.raises(
        CapacityError, match=r"needs 11 blocks of 4 tokens \(prompt 20, answer up to 22\), .* 10"
    ):
        scheduler.add(request(1, length=20, most=22))
    assert scheduler.num_waiting == 1 and scheduler.sequence(1) is None


def test_a_wild_priority_is_refused() -> None:
    with pytest.raises(RequestError, match="priority is 101, but must be from -100 to 100"):
        make().add(request(0, priority=101))


def several(number: int, answers: int) -> Sequence:
    """A request for several answers, that fits any pool here."""
    return Sequence(number, [100 + number], SamplingParams(max_tokens=4, n=answers), arrival=float(number))


def taken(scheduler: Scheduler, answers: int = 1, number: int = 1000) -> int:
    """How many requests of so many answers are taken in until the queue is full, from id ``number`` on."""
    before = len(scheduler)
    with pytest.raises(BusyError):
        for more in range(1000):
            scheduler.add(several(number + more, answers))
    return len(scheduler) - before


def test_500_requests_at_once_on_an_idle_server_are_all_taken_in() -> None:
    """244 were refused where 256 may run and 256 wait: those that could run at once counted as waiting."""
    scheduler = make(blocks=2000, max_num_seqs=256, max_queued_requests=256)
    assert taken(scheduler) == 512
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (256, 256)
    assert taken(scheduler, number=5000) == 0
    scheduler.cancel(1000)
    assert taken(scheduler, number=5000) == 1, "a place is free"


def test_a_queue_of_none_means_that_nobody_waits_beyond_those_who_run() -> None:
    scheduler = make(max_num_seqs=3, max_queued_requests=0)
    assert taken(scheduler) == 3
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 0)
    with pytest.raises(BusyError, match="3 answers are being made and 0 wait, which is the most; try again"):
        scheduler.add(several(10, 1))


def test_a_request_counts_as_often_as_it_has_answers() -> None:
    scheduler = make(max_num_seqs=4, max_queued_requests=2)
    assert taken(scheduler, answers=2) == 3
    plan = scheduler.schedule()
    forks = [Advance(item.seq_id, (5,), None, (Advance(50 + item.seq_id, (6,)),)) for item in plan.items]
    scheduler.commit(plan, forks)
    scheduler.check_integrity()
    assert taken(scheduler, number=5000) == 0, "they are as many answers as before"
    scheduler.cancel(1050)
    assert taken(scheduler, number=5000) == 1
    large = make(max_num_seqs=4, max_queued_requests=0)
    large.add(several(0, 9))
    assert taken(large) == 0, "one that is too large for the queue runs where it is alone"


def test_those_for_whom_there_is_no_memory_wait() -> None:
    scheduler = make(blocks=10, max_num_seqs=100, max_queued_requests=3)
    scheduler.add(request(0, length=20, most=10))
    for number in (1, 2, 3):
        scheduler.add(request(number, length=20, most=10))
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 3)
    with pytest.raises(BusyError, match="1 answers are being made and 3 wait"):
        scheduler.add(request(4))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_num_seqs": 0}, r"max_num_seqs \(--max-concurrent\) is 0, but must be a whole number from 1"),
        ({"max_queued_requests": -5}, r"max_queued_requests \(--max-queue\) is -5, .* from 0"),
        (
            {"max_step_ms": float("nan")},
            r"max_step_ms \(--max-step-ms\) is nan, but must be a number above 0",
        ),
        ({"preemption": "swop"}, "preemption is 'swop', but must be one of 'auto', 'recompute', 'swap'"),
        (
            {"max_num_seqs": 8, "max_num_batched_tokens": 7},
            "max_num_batched_tokens is 7, but must be at least max_num_seqs",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SchedulerSettings(**wrong)


def test_a_level_of_priority_is_worth_some_seconds_of_waiting() -> None:
    scheduler = make(max_num_seqs=1, max_num_batched_tokens=100, ageing_s=10.0)
    scheduler.add(request(0, arrival=0.0))
    scheduler.add(request(1, arrival=11.0, priority=1))
    scheduler.add(request(2, arrival=9.0, priority=1))
    order = []
    while len(scheduler):
        (first,) = step(scheduler).items
        order.append(first.seq_id)
        scheduler.cancel(first.seq_id)
    assert order == [2, 0, 1], "9 s later is made up for by a level, 11 s is not"


def test_the_lowest_priority_and_the_latest_arrival_make_room() -> None:
    scheduler = make(blocks=6, max_num_seqs=3)
    for number, priority in ((0, -1), (1, 0), (2, 0)):
        scheduler.add(request(number, length=4, most=12, priority=priority, arrival=0.0))
    gone = []
    while len(gone) < 2:
        step(scheduler)
        waiting = [n for n in range(3) if (seq := scheduler.sequence(n)) and seq.status == "waiting"]
        gone += [n for n in waiting if n not in gone]
    assert gone == [0, 2]


def test_who_was_preempted_goes_on_before_who_came_later() -> None:
    scheduler = make(blocks=5, max_num_seqs=2)
    scheduler.add(request(0, length=7, most=10))
    scheduler.add(request(1, length=7, most=10))
    while scheduler.preempted["recompute"] == 0:
        step(scheduler)
    scheduler.add(request(2, length=1, most=1))
    assert shape(step(scheduler))[0][0] == 0, "there would be room for request 2, but it has to wait"
    scheduler.cancel(0)
    assert [seq_id for seq_id, *_ in shape(step(scheduler))] == [1, 2]


def test_a_block_is_left_for_each_that_runs() -> None:
    scheduler = make(blocks=5, max_num_seqs=2)
    scheduler.add(request(0, length=7, most=2))
    step(scheduler)
    scheduler.add(request(1, length=12, most=2))
    assert len(step(scheduler).items) == 1, "three blocks were free, but then none would be left"
    scheduler.cancel(0)
    assert shape(step(scheduler)) == [(1, 12, 1)]


@pytest.mark.parametrize(
    ("policy", "swap_ms", "expected"),
    [
        ("recompute", 0.0, "recompute"),
        ("swap", inf, "swap"),
        ("auto", 0.01, "swap"),
        ("auto", 10.0, "recompute"),
    ],
)
def test_preemption_takes_the_way_that_costs_less(policy: str, swap_ms: float, expected: str) -> None:
    scheduler = make(blocks=6, host=6, preemption=policy, swap_ms_per_block=swap_ms)
    for _ in range(100):
        scheduler.speed.observe(Plan([], 0, [], [], [], chunk_tokens=256), 256.0)
    for number in range(2):
        scheduler.add(request(number, length=7, most=16))
    while not (taken := {way for way, times in scheduler.preempted.items() if times}):
        plan = step(scheduler)
    assert taken == {expected}
    assert len(plan.swap_out) == (3 if expected == "swap" else 0)
    seq = scheduler.sequence(1)
    assert seq and seq.status == "waiting" and seq.num_computed_tokens == (12 if expected == "swap" else 0)
    scheduler.cancel(0)
    plan = step(scheduler)
    assert len(plan.swap_in) == (expected == "swap"), "one block had been given away, two are still cached"
    assert [len(item.tokens) for item in plan.items] == [1 if expected == "swap" else 5]


def test_a_swapped_sequence_comes_back_from_the_host() -> None:
    scheduler = make(blocks=6, host=6, preemption="swap")
    for number in range(2):
        scheduler.add(request(number, length=7, most=16))
    while not scheduler.preempted["swap"]:
        plan = step(scheduler)
    out = dict(plan.swap_out)
    while scheduler.sequence(0) and len(scheduler.sequence(0).tokens) < 23:
        step(scheduler)
    scheduler.cancel(0)
    plan = step(scheduler)
    assert {slot for slot, _ in plan.swap_in} <= set(out.values()) and plan.swap_in
    assert shape(plan) == [(1, 1, 1)]


def test_forks_share_a_prompt_and_go_their_own_ways() -> None:
    scheduler = make()
    scheduler.add(request(0, length=6, most=8))
    plan = scheduler.schedule()
    forks = (Advance(10, (21,)), Advance(11, (22,), "stop"))
    advance = Advance(0, (20,), None, forks)
    advanced = scheduler.commit(plan, [advance])
    assert [(one.id, one.finish_reason) for one in advanced] == [(0, None), (10, None), (11, "stop")]
    assert scheduler.usage().used == 2, "six tokens take two blocks, once"
    plan = step(scheduler)
    assert [item.tokens for item in plan.items] == [[20], [21]]
    assert plan.items[0].block_table[0] == plan.items[1].block_table[0]
    assert plan.copies == [(plan.items[1].block_table[1], plan.items[0].block_table[1])]
    child = scheduler.sequence(10)
    assert child and list(child.tokens) == [100] * 6 + [21, 1] and child.prompt_len == 6


def test_a_fork_too_many_waits_and_finds_the_prompt_cached() -> None:
    scheduler = make(max_num_seqs=1)
    scheduler.add(request(0, length=9))
    scheduler.commit(scheduler.schedule(), [Advance(0, (20,), None, (Advance(10, (21,)),))])
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    scheduler.cancel(0)
    plan = step(scheduler)
    assert [(item.seq_id, item.tokens) for item in plan.items] == [(10, [21])], (
        "all but its own token is there"
    )


def test_a_draft_is_more_tokens_in_an_item_of_which_some_are_kept() -> None:
    scheduler = make()
    scheduler.add(request(0, length=5))
    step(scheduler)
    plan = scheduler.schedule()
    (item,) = plan.items
    plan.items[0] = item._replace(tokens=[*item.tokens, 31, 32], logit_rows=3)
    scheduler.commit(plan, [Advance(0, (31, 40))])
    seq = scheduler.sequence(0)
    assert seq and seq.tokens[5:] == [1, 31, 40] and seq.num_computed_tokens == 7, (
        "31 was right and is held, 32 is not"
    )
    assert step(scheduler).items[0].tokens == [40]


def test_the_next_turn_of_a_conversation_finds_the_answer_cached() -> None:
    scheduler = make()
    first = request(0, length=6, most=8)
    scheduler.add(first)
    for _ in range(8):
        step(scheduler)
    plan = scheduler.schedule()
    scheduler.commit(plan, [Advance(0, (2,), "stop")])
    turn = Sequence(1, [*first.tokens, 7, 8, 9])
    scheduler.add(turn)
    plan = step(scheduler)
    assert turn.cached_tokens == 14, "all that was computed, to the token"
    assert plan.items[0].tokens == [2, 7, 8, 9]
    prefix = scheduler.blocks.prefix
    assert prefix and (prefix.hit_tokens, prefix.miss_tokens) == (14, 6 + 4)


def test_time_outs_end_waiting_and_running_requests() -> None:
    scheduler = make(max_num_seqs=1, max_wait_s=5.0)
    scheduler.add(request(0, deadline=20.0))
    scheduler.add(request(1))
    step(scheduler)
    assert scheduler.expire(5.9) == []
    assert scheduler.expire(6.0) == [Output(1, "timeout")], "its first step did not come in 5 s"
    step(scheduler)
    assert scheduler.expire(20.0) == [Output(0, "timeout")]
    assert len(scheduler) == 0 and scheduler.usage().used == 0


def test_what_ended_while_its_step_ran_is_passed_over() -> None:
    scheduler = make()
    scheduler.add(request(0))
    scheduler.add(request(1))
    plan = scheduler.schedule()
    assert scheduler.cancel(0) == Output(0, "cancelled")
    assert [seq.id for seq in scheduler.commit(plan, [Advance(0, (5,)), Advance(1, (6,))])] == [1]
    assert scheduler.cancel(0) is None
    scheduler.check_integrity()


def test_after_a_failed_step_the_others_start_over() -> None:
    scheduler = make(max_num_batched_tokens=8, max_num_seqs=2)
    scheduler.add(request(0, length=8))
    scheduler.add(request(1, length=8, most=8))
    step(scheduler)
    plan = scheduler.schedule()
    plan.items[:] = [item for item in plan.items if item.seq_id == 0]
    assert scheduler.abandon(plan) == [Output(0, "error")]
    assert scheduler.usage().cached == 0, "what was cached is lost with the pool"
    assert shape(step(scheduler)) == [(1, 8, 1)]


def test_many_more_than_may_run_are_all_served_in_order() -> None:
    scheduler = make(blocks=1000, max_num_seqs=4, max_num_batched_tokens=64)
    for number in range(100):
        scheduler.add(request(number, length=5, most=3))
    first: list[int] = []
    while len(scheduler):
        plan = scheduler.schedule()
        first += [item.seq_id for item in plan.items if item.start == 0]
        ends = {item.seq_id: len(scheduler.sequence(item.seq_id).tokens) == 7 for item in plan.items}
        scheduler.commit(
            plan, [Advance(i.seq_id, (1,), "length" if ends[i.seq_id] else None) for i in plan.items]
        )
    assert first == list(range(100))


def test_a_step_that_cannot_be_planned_ahead_leaves_no_copy_for_another_plan() -> None:
    """One of two answers needs a copy of the block that they share, the other sequence one more block."""
    scheduler = make(blocks=5)
    scheduler.add(request(0, length=6, most=8))
    scheduler.add(request(1, length=8, most=8))
    plan = scheduler.schedule()
    fork = Advance(2, (5,))
    scheduler.commit(plan, [Advance(0, (4,), forks=(fork,)), Advance(1, (4,))])
    held = [
        PlanItem(seq_id, array("i", (4,)), start - 1, array("i"), 1)
        for seq_id, start in ((0, 6), (2, 6), (1, 8))
    ]
    assert scheduler.blocks.available == 1
    assert scheduler.follow(Plan(held, 5, [], [], [], decodes=3), ()) is None
    assert scheduler.blocks.drain() == Plan([], scheduler.blocks.capacity) and scheduler.blocks.available == 1


def test_steps_are_prepared_ahead_while_somebody_waits_for_memory_that_is_not_there() -> None:
    """None of 50 was: whoever waited might have been admitted, were there memory."""
    scheduler = make(blocks=50)
    for number in range(2):
        scheduler.add(request(number, length=8, most=80))
    scheduler.add(request(2, length=180, most=4))
    step(scheduler)
    plan, ahead = scheduler.schedule(), 0
    for _ in range(50):
        following = scheduler.follow(plan, ())
        ahead += following is not None
        scheduler.commit(plan, [Advance(item.seq_id, (1,)) for item in plan.items])
        plan = following or scheduler.schedule()
        assert scheduler.num_waiting == 1 and plan.decodes == 2
    assert ahead == 50, f"{ahead} of 50 steps were prepared ahead"
    scheduler.cancel(0)
    scheduler.cancel(1)
    assert shape(step(scheduler)) == [(2, 180, 1)], "and it starts as soon as there is room"


def test_no_step_is_prepared_ahead_of_somebody_who_might_start() -> None:
    scheduler = make(blocks=50)
    scheduler.add(request(0))
    step(scheduler)
    plan = scheduler.schedule()
    assert scheduler.follow(plan, ()) is not None
    scheduler.add(request(1))
    assert scheduler.follow(plan, ()) is None


def test_who_can_never_run_is_refused_when_memory_has_gone() -> None:
    scheduler = Scheduler(BlockManager(SIZE, 12, slab=1))
    for number, length in enumerate((24, 8, 40)):
        scheduler.add(request(number, length=length, most=8))
    scheduler.blocks.set_limit(5)
    assert scheduler.refuse() == [Output(0, "error")], "the third may wait: the second goes before it"
    assert shape(step(scheduler)) == [(1, 8, 1)] and scheduler.refuse() == []
    scheduler.cancel(1)
    assert scheduler.refuse() == [Output(2, "error")] and len(scheduler) == 0


def test_who_waited_for_a_block_to_spare_starts_alone_though_no_more_are_there() -> None:
    scheduler = Scheduler(BlockManager(SIZE, 12, slab=1))
    scheduler.add(request(0, length=8, most=8))
    scheduler.add(request(1, length=40, most=8))
    assert shape(step(scheduler)) == [(0, 8, 1)] and scheduler.blocks.available == 10
    scheduler.cancel(0)
    scheduler.blocks.set_limit(10)
    assert scheduler.blocks.available == 10 and scheduler.refuse() == []
    assert shape(step(scheduler)) == [(1, 40, 1)]


def test_who_outgrows_the_pool_alone_goes_to_the_host_and_is_refused() -> None:
    """By a plan without items, which is carried out all the same."""
    blocks = BlockManager(SIZE, 12, slab=1, host_blocks=12)
    scheduler = Scheduler(blocks, SchedulerSettings(preemption="swap"))
    scheduler.add(request(0, length=8, most=16))
    step(scheduler)
    scheduler.blocks.set_limit(2)
    plan = scheduler.schedule()
    assert plan.items == [] and plan.preempted == [(0, True)] and len(plan.swap_out) == 2
    assert scheduler.refuse() == [Output(0, "error")] and scheduler.usage().host_used == 0
