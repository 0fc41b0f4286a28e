"""Sequences join and leave between steps: who is in the next one, what each gets, what an end leaves."""

from __future__ import annotations

import random
from array import array
from math import inf
from typing import Any

import pytest
from digests import Model, alone, answer

from tiny_llm.data import Advance, Output, Plan, PlanItem, Sequence
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.sampling_params import PoolingParams, SamplingParams
from tiny_llm.scheduler.places import StepPlan
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.scheduler.speed import UNKNOWN_MODEL

pytestmark = pytest.mark.chapter("2.9")

SIZE = 4


def make(blocks: int = 100, window: int = 0, drafters: Any = None, **limits: Any) -> Scheduler:
    """A scheduler over a pool of ``blocks`` blocks of 4 tokens."""
    limits.setdefault("max_step_ms", inf)
    return Scheduler(
        BlockManager(SIZE, blocks, window=window), SchedulerSettings(**limits), drafters=drafters
    )


def request(number: int, length: int = 8, most: int = 16, **more: Any) -> Sequence:
    """A prompt like no other's, that came ``number`` seconds after the start."""
    more.setdefault("arrival", float(number))
    more.setdefault("params", SamplingParams(max_tokens=most))
    return Sequence(number, array("i", [100 + number] * length), **more)


def commit(scheduler: Scheduler, plan: Plan, token: int = 1) -> list[Sequence]:
    """Give each sequence that is up to date ``token``."""
    return scheduler.commit(plan, [Advance(one.seq_id, (token,)) for one in plan.items if one.logit_rows])


def step(scheduler: Scheduler, token: int = 1) -> Plan:
    """One step in which each sequence that is up to date gets ``token``."""
    plan = scheduler.schedule()
    commit(scheduler, plan, token)
    scheduler.check_integrity()
    return plan


def running(*lengths: int, **given: Any) -> Scheduler:
    """A scheduler of sequences that decode, with prompts of such lengths."""
    scheduler = make(**given)
    for number, length in enumerate(lengths):
        scheduler.add(request(number, length))
    step(scheduler)
    return scheduler


def decoding(
    scheduler: Scheduler, tokens: int = 64, most: int = 100
) -> tuple[list[PlanItem], list[int], StepPlan]:
    """What ``_decode`` puts into a step, the sequences that it says are behind, and the step."""
    plan = StepPlan(tokens, most, most)
    behind = [entry.seq.id for entry in scheduler._decode(plan)]
    return plan.items, behind, plan


def test_each_that_is_one_behind_gets_one_row_at_its_own_position() -> None:
    scheduler = running(5, 9, 3)
    items, behind, plan = decoding(scheduler)
    assert [(one.seq_id, one.tokens.tolist(), one.start) for one in items] == [
        (0, [1], 5),
        (1, [1], 9),
        (2, [1], 3),
    ]
    assert [one.logit_rows for one in items] == [1, 1, 1], "each wants to go on"
    assert [len(one.block_table) for one in items] == [2, 3, 1], "blocks of what is there and the new token"
    assert not behind and plan.decodes == 3 and plan.tokens == 61, "each takes a token of the budget"
    assert plan.decode_context == 5 + 9 + 3, "tokens before them"


def test_a_plan_has_a_copy_of_the_blocks_as_far_as_its_tokens() -> None:
    scheduler = running(7)
    (entry,) = scheduler._running.items
    scheduler.blocks.reserve(entry.table, 7, 20)
    items, _, _ = decoding(scheduler)
    assert items[0].block_table == entry.table.blocks[:2], "8 tokens take two blocks, room ahead is not sent"
    before = items[0].block_table[:]
    entry.table.blocks[0] = 77
    assert items[0].block_table == before, "a plan that is carried out later must not change"


def test_room_is_asked_for_where_there_is_none_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, asked = running(4, 7, 6), list[tuple[int, int]]()
    monkeypatch.setattr(
        scheduler, "_make_room", lambda entry, end, step: asked.append((entry.seq.id, end)) or True
    )
    scheduler._running.items[0].table.blocks.append(99)  # what would have been given
    decoding(scheduler)
    assert asked == [(0, 5)], "7 and 6 tokens and one more have room in their second blocks"


def test_who_needs_a_new_block_gets_it_now() -> None:
    scheduler = running(4, 6)
    free = scheduler.blocks.available
    items, _, _ = decoding(scheduler)
    assert len(items[0].block_table) == 2 and scheduler.blocks.available == free - 1, (
        "position 4 is in a new one"
    )


def test_one_token_behind_is_a_decode_whoever_it_is() -> None:
    scheduler = make()
    scheduler.add(request(0, length=9))
    step(scheduler)
    scheduler.cancel(0)
    scheduler.add(request(1, length=5))
    scheduler._start(scheduler._entries[1])
    scheduler._entries[1].seq.num_computed_tokens = 4  # all but the last was found
    items, behind, _ = decoding(scheduler)
    assert [one.seq_id for one in items] == [1] and not behind, "there are no phases"


def test_who_is_further_behind_is_returned_even_in_its_answer() -> None:
    scheduler = running(5, 6)
    scheduler._entries[1].seq.num_computed_tokens = 2  # as after a preemption
    items, behind, plan = decoding(scheduler)
    assert ([one.seq_id for one in items], behind) == ([0], [1]), "seven tokens, five of them to be computed"
    assert plan.decodes == 1 and plan.tokens == 63


def test_the_held_and_those_under_way_are_left_out() -> None:
    scheduler = running(5, 6, 7)
    scheduler._entries[0].held = True
    plan = StepPlan(
        64, 100, 100, beside=[Plan([PlanItem(2, array("i", [1]), 7, array("i"), 1)], 9, [], [], [])]
    )
    assert not scheduler._decode(plan)
    assert [one.seq_id for one in plan.items] == [1], "0 waits for others, 2 is in a step already"


def test_a_full_step_still_finds_those_behind() -> None:
    scheduler = running(5, 6, 7)
    scheduler._entries[2].seq.num_computed_tokens = 3
    items, behind, _ = decoding(scheduler, most=1)
    assert [one.seq_id for one in items] == [0], "a step has so many decodes at most"
    assert behind == [2], "1 is passed over, and whoever is behind is found all the same"


def test_a_text_without_an_answer_never_decodes() -> None:
    scheduler = make()
    scheduler.add(request(0, length=1, params=PoolingParams()))
    scheduler._start(scheduler._entries[0])
    items, behind, _ = decoding(scheduler)
    assert not items and behind == [0], "it has one token to compute, and nothing is drawn"


@pytest.mark.parametrize("computed", [8, 6])
def test_who_has_to_make_room_for_itself_ends_the_list(computed: int) -> None:
    scheduler = make(blocks=5)
    for number in range(2):
        scheduler.add(request(number, most=8))
    step(scheduler)  # each needs a third block now, and one is left
    scheduler._entries[1].seq.num_computed_tokens = computed
    items, behind, plan = decoding(scheduler)
    assert [one.seq_id for one in items] == [0] and not behind, "who had to go is not in the step"
    assert plan.decodes == 1 and plan.preempted == [(1, False)], "the last in rank had to go"


def test_who_makes_room_for_others_is_not_in_the_step() -> None:
    scheduler = make(blocks=8)
    for number in range(3):
        scheduler.add(request(number, most=8))
    step(scheduler)
    scheduler.blocks._take(scheduler.blocks.available)  # somebody else has the rest
    items, behind, plan = decoding(scheduler)
    assert [one.seq_id for one in items] == [0, 1] and not behind, "the list has become shorter meanwhile"
    assert plan.preempted == [(2, False)]


def test_who_is_left_out_takes_no_block() -> None:
    scheduler = running(8, 8, 8)
    scheduler._entries[2].held = True
    free = scheduler.blocks.available
    items, _, _ = decoding(scheduler, most=1)
    assert [one.seq_id for one in items] == [0] and scheduler.blocks.available == free - 1


def test_without_decodes_prompts_have_all_the_time() -> None:
    scheduler = make(max_step_ms=50.0, max_num_seqs=4)
    scheduler.add(request(0, length=30))
    scheduler.add(request(1, length=30))
    scheduler._start(scheduler._entries[0])
    _, behind, plan = decoding(scheduler)
    assert behind == [0] and plan.bound_ms == plan.ms == inf, "nobody waits for his next word"


def test_with_a_window_room_is_made_for_as_much_as_a_step_takes() -> None:
    scheduler = make(blocks=20, window=8, max_num_batched_tokens=8, max_num_seqs=4)
    scheduler.add(request(0, length=40))
    step(scheduler)
    _, behind, _ = decoding(scheduler)
    (entry,) = scheduler._running.items
    assert behind == [0] and entry.table.writable == 16, "the next eight tokens, not all 40"


def test_of_what_a_window_hides_nothing_is_context() -> None:
    scheduler = Scheduler(BlockManager(SIZE, 20), costs=UNKNOWN_MODEL._replace(windows=((4, 1.0),)))
    scheduler.add(request(0, length=12))
    step(scheduler)
    _, _, plan = decoding(scheduler)
    assert plan.decode_context == 3, "the last four, itself included"


@pytest.mark.parametrize("who", ["behind", "waiting", "nobody"])
def test_chunks_beside_decodes_get_the_time_that_is_left(who: str) -> None:
    scheduler = running(5, max_step_ms=50.0, max_num_seqs=4)
    if who != "nobody":
        scheduler.add(request(1, length=30))
    if who == "behind":
        scheduler._start(scheduler._entries[1])
    _, behind, plan = decoding(scheduler)
    assert behind == [1] * (who == "behind")
    assert who == "nobody" or plan.bound_ms == 45.0, "limit_time() was not called, and somebody is to come in"


def test_guesses_count_before_the_time_that_is_left() -> None:
    def nine(seq: Sequence, most: int) -> array[int]:
        return array("i", [9] * most)

    scheduler = running(
        5, drafters={"nine": nine}, max_step_ms=50.0, max_num_batched_tokens=64, max_num_seqs=4
    )
    scheduler.add(request(1, length=30))
    items, _, plan = decoding(scheduler)
    assert plan.drafted == len(items[0].tokens) - 1 > 0, "speculation.extend() was not called"
    alone = scheduler.speed.decode_ms(1 + plan.drafted, plan.decode_context)
    assert plan.ms == pytest.approx(45.0 - alone), "guesses take time too"


def test_commit_gives_each_its_own_token() -> None:
    scheduler = running(5, 6)
    scheduler.add(request(2, length=3))
    plan = scheduler.schedule()
    done = scheduler.commit(plan, [Advance(one.seq_id, (10 + one.seq_id,)) for one in plan.items])
    assert [seq.id for seq in done] == [0, 1, 2], "all of these advanced, in the plan's order"
    assert [seq.tokens[-1] for seq in done] == [10, 11, 12]
    assert [seq.num_computed_tokens for seq in done] == [6, 7, 3], "the new token itself is not computed yet"
    assert [len(seq.tokens) for seq in done] == [7, 8, 4]


def test_who_is_in_the_middle_of_a_prompt_gets_no_advance() -> None:
    scheduler = make(max_num_batched_tokens=8, max_num_seqs=4)
    scheduler.add(request(0, length=20))
    plan = scheduler.schedule()
    assert plan.items[0].logit_rows == 0 and commit(scheduler, plan) == [], "nothing was drawn"
    seq = scheduler.sequence(0)
    assert seq and seq.num_computed_tokens == 8 and len(seq.tokens) == 20, "its chunk is computed"


def test_advances_go_to_items_with_rows_alone() -> None:
    scheduler = make(max_num_batched_tokens=12, max_num_seqs=4)
    scheduler.add(request(0, length=20))
    scheduler.add(request(1, length=2))
    scheduler._start(scheduler._entries[1])
    scheduler._start(scheduler._entries[0])
    plan = scheduler.schedule()
    first, blocks = plan.items[0], scheduler._entries[1].table.blocks
    assert first.logit_rows == 0
    plan.items.append(PlanItem(1, array("i", [101, 101]), 0, blocks[:], 1))
    assert [seq.id for seq in scheduler.commit(plan, [Advance(1, (5,))])] == [1]


def test_who_ended_while_its_step_ran_is_passed_over_with_its_token() -> None:
    scheduler = running(5, 6, 7)
    plan = scheduler.schedule()
    assert scheduler.cancel(1) == Output(1, "cancelled")
    done = scheduler.commit(plan, [Advance(one.seq_id, (10 + one.seq_id,)) for one in plan.items])
    assert [(seq.id, seq.tokens[-1]) for seq in done] == [(0, 10), (2, 12)], "1's token belongs to nobody"
    scheduler.check_integrity()


def test_a_token_that_ends_an_answer_is_its_last() -> None:
    scheduler = running(5, 6)
    plan = scheduler.schedule()
    first, second = scheduler.commit(plan, [Advance(0, (10,), "stop"), Advance(1, (11,))])
    assert first.status == "finished" and first.finish_reason == "stop" and first.tokens[-1] == 10
    assert scheduler.sequence(0) is None and second.status == "running"
    assert [one.seq_id for one in scheduler.schedule().items] == [1], (
        "it left, and the next step has one row less"
    )


def test_an_end_may_come_without_a_token() -> None:
    scheduler = running(5)
    (seq,) = scheduler.commit(scheduler.schedule(), [Advance(0, (), "error")])
    assert seq.finish_reason == "error" and len(scheduler) == 0 and scheduler.usage().used == 0


def test_who_gets_neither_token_nor_end_is_held() -> None:
    scheduler = running(5, 6)
    (first, _) = scheduler.commit(scheduler.schedule(), [Advance(0, ()), Advance(1, (7,))])
    assert first.id == 0 and first.num_computed_tokens == len(first.tokens) == 6, "all of it is computed"
    plan = scheduler.schedule()
    assert [one.seq_id for one in plan.items] == [1], "it is held"
    done = scheduler.commit(plan, [Advance(1, (8,))], [Advance(0, (3,))])
    assert [(seq.id, seq.tokens[-1]) for seq in done] == [(1, 8), (0, 3)], (
        "those that are let go on come last"
    )
    assert [one.seq_id for one in scheduler.schedule().items] == [0, 1]


def test_forks_come_behind_their_parent_and_lack_its_token() -> None:
    scheduler = running(5, 6)
    plan = scheduler.schedule()
    done = scheduler.commit(plan, [Advance(0, (10,), None, (Advance(50, (20,)),)), Advance(1, (11,))])
    assert [(seq.id, seq.tokens[-2:].tolist()) for seq in done] == [(0, [1, 10]), (50, [1, 20]), (1, [1, 11])]
    scheduler.check_integrity()


@pytest.mark.parametrize(("right", "kept"), [(0, 6), (1, 7), (2, 8)])
def test_of_a_draft_what_was_right_is_computed(right: int, kept: int) -> None:
    scheduler = running(5)
    plan = scheduler.schedule()
    (item,) = plan.items
    plan.items[0] = item._replace(tokens=item.tokens + array("i", [31, 32]), logit_rows=3)
    (seq,) = scheduler.commit(plan, [Advance(0, [*[31, 32, 40][:right], 50])])
    assert seq.num_computed_tokens == kept, (
        "what was rejected is not kept, nor is the token drawn last computed"
    )
    assert seq.tokens[6:].tolist() == [*[31, 32][:right], 50]


def test_full_blocks_are_registered_once_their_tokens_are_known() -> None:
    scheduler = running(7)
    plan = scheduler.schedule()
    (item,) = plan.items
    plan.items[0] = item._replace(tokens=item.tokens + array("i", [31, 32, 33, 34]), logit_rows=5)
    scheduler.commit(plan, [Advance(0, (31, 50))])
    (entry,) = scheduler._running.items
    prefix = scheduler.blocks.prefix
    assert prefix is not None and len(prefix) == 2 and entry.table.full_at == 12, "12 and 13 are not computed"
    scheduler.add(Sequence(1, array("i", [100] * 7 + [1, 31, 50, 4, 5, 6])))
    step(scheduler)
    seq = scheduler.sequence(1)
    assert seq and seq.cached_tokens == 8, "who begins alike finds what is full while the other still runs"


def test_a_block_is_registered_with_its_last_token() -> None:
    scheduler = running(7)
    step(scheduler)
    (entry,) = scheduler._running.items
    assert entry.seq.num_computed_tokens == 8 and entry.table.full_at == 12, "at once, and not one later"


def test_how_good_guesses_were_is_told() -> None:
    scheduler = running(5, drafters={"nine": lambda seq, most: array("i", [9] * most)})
    plan = scheduler.schedule()
    assert plan.drafted > 1 and scheduler.speculation is not None
    scheduler.commit(plan, [Advance(0, (9, 4))])
    assert (scheduler.speculation.drafted["nine"], scheduler.speculation.accepted["nine"]) == (
        plan.drafted,
        1,
    )


def test_what_a_window_hides_is_given_back() -> None:
    scheduler = make(blocks=20, window=6)
    scheduler.add(request(0, length=5, most=40))
    for _ in range(20):
        step(scheduler)
    (entry,) = scheduler._running.items
    assert entry.table.gone == 4 and scheduler.usage().used <= 3, "a step at a time"


def test_an_end_leaves_every_list_and_the_pool() -> None:
    scheduler = running(8, 8, max_wait_s=50.0)
    scheduler.add(request(2, deadline=60.0))
    step(scheduler)
    scheduler.add(request(3, deadline=70.0, params=SamplingParams(max_tokens=2, n=3)))
    assert scheduler.cancel(0) == Output(0, "cancelled") and scheduler.cancel(2) == Output(2, "cancelled")
    assert scheduler.cancel(3, "timeout") == Output(3, "timeout"), "who waits can end too"
    assert (len(scheduler), scheduler.num_running, scheduler.num_waiting) == (1, 1, 0)
    assert scheduler._answers == 1, "a request counts as often as it has answers"
    scheduler.check_integrity()
    assert scheduler.expire(1e9) == [], "deadlines and patience of who has ended are forgotten"
    assert [one.seq_id for one in step(scheduler).items] == [1]


def test_what_was_computed_can_be_found_again() -> None:
    scheduler = running(6)
    seq = scheduler.sequence(0)
    assert seq
    scheduler.commit(scheduler.schedule(), [Advance(0, (5,), "stop")])
    assert seq.status == "finished" and scheduler.usage().used == 0 and scheduler.usage().cached == 2
    again = Sequence(1, array("i", [*seq.tokens, 7]))
    scheduler.add(again)
    step(scheduler)
    assert again.cached_tokens == 7, "all but the last token, which nobody has computed"


def test_what_is_to_be_pinned_is_pinned_before_its_blocks_are_free() -> None:
    scheduler = make()
    scheduler.add(request(0, length=8, pin=(3, 8)))
    scheduler.commit(scheduler.schedule(), [Advance(0, (5,), "length")])
    assert 3 in scheduler.pins and scheduler.usage().pinned == 2, "its prompt stays"


def test_traffic_gets_the_answers_that_each_gets_alone() -> None:
    for seed in range(12):
        traffic(random.Random(seed))


def traffic(chance: random.Random) -> None:
    """Requests come at any time and leave when they are over, in a pool that is too small for all."""
    scheduler, model, live, coming = (
        make(blocks=12, max_num_seqs=4, max_num_batched_tokens=9),
        Model(0),
        {},
        12,
    )
    for now in range(1000):
        if coming and chance.random() < 0.3:
            length = chance.randint(1, 14)
            tokens = array("i", [chance.randrange(2) for _ in range(length)])
            params = SamplingParams(max_tokens=chance.randint(1, 12))
            live[coming] = Sequence(coming, tokens, params, arrival=float(now))
            scheduler.add(live[coming])
            coming -= 1
        plan = scheduler.schedule()
        model.move(plan)
        advances = []
        for item in plan.items:
            seq = live[item.seq_id]
            states = model.compute(item, seq)
            if item.logit_rows:
                token, ended = answer(states[-1], 0)
                over = (
                    "stop"
                    if ended
                    else "length"
                    if len(seq.tokens) + 1 == seq.prompt_len + seq.params.max_tokens
                    else None
                )
                advances.append(Advance(seq.id, (token,), over))
        for seq in scheduler.commit(plan, advances):
            if seq.finish_reason:
                assert seq.tokens[seq.prompt_len :].tolist() == alone(seq, 0), "another answer than alone"
                del live[seq.id]
        scheduler.check_integrity()
        if not live and not coming:
            return
    raise AssertionError(f"{len(live)} are not served after 1,000 steps")
