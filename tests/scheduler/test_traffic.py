"""Random traffic through the scheduler, with a model that answers at once from what its cache really holds.

The model's next token is a function of every token before it, read through the block table. So a block
that was lost, mixed up, overwritten or not copied changes an answer, and every answer is compared
with the one that the request gets alone.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from math import inf
from typing import Any, ClassVar

import pytest
from digests import SIZE, Group, Model, alone, answer, following, group_alone, survivors
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tiny_llm.data import Advance, Output, Plan, Sequence
from tiny_llm.errors import BusyError, CapacityError
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import Preemption, SchedulerSettings

pytestmark = pytest.mark.slow

AGEING_S = 5.0
EVENTS = ("answered", "refused", "busy", "cancelled", "timeout", "failed", "forks", "copies", "hits")
EVENTS += ("held", "parked", "turns", "dead")
EVENTS += ("recompute", "swap", "back", "ahead", "for nothing", "starved", "drafted", "accepted", "rejected")


class Traffic(RuleBasedStateMachine):
    """Arrivals, forks, priorities, cancels, time-outs and failures, in pools that are too small."""

    seen: ClassVar[Counter[str]] = Counter()

    @initialize(
        limit=st.integers(6, 40),
        slab=st.integers(1, 8),
        host=st.sampled_from([0, 8, 40]),
        caching=st.sampled_from([True, True, True, False]),
        running=st.integers(1, 8),
        extra_tokens=st.integers(0, 24),
        step_ms=st.sampled_from([3.0, 30.0, inf]),
        preemption=st.sampled_from(["auto", "recompute", "swap", "swap"]),
        swap_ms=st.sampled_from([0.01, 1.0, inf]),
        right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        drafting=st.booleans(),
    )
    def start(
        self,
        limit: int,
        slab: int,
        host: int,
        caching: bool,
        running: int,
        extra_tokens: int,
        step_ms: float,
        preemption: Preemption,
        swap_ms: float,
        right: float,
        drafting: bool,
    ) -> None:
        blocks = BlockManager(SIZE, limit, slab=slab, host_blocks=host, prefix_cache=caching)
        self.settings = SchedulerSettings(
            max_num_seqs=running,
            max_num_batched_tokens=running + extra_tokens,
            max_step_ms=step_ms,
            max_queued_requests=12,
            max_wait_s=20.0,
            ageing_s=AGEING_S,
            preemption=preemption,
            swap_ms_per_block=swap_ms,
        )
        self.right = right
        self.known: dict[int, tuple[int, int]] = {}  # of each sequence: its tokens, and the state after them
        self.scheduler = Scheduler(blocks, self.settings, drafters={"a": self._draft} if drafting else {})
        self.model = Model(host)
        self.now = 0.0
        self.ids = iter(range(10**9))
        self.live: dict[int, Sequence] = {}
        self.branch: dict[int, int] = {}
        self.forks_to_come: dict[int, int] = {}
        self.groups: dict[int, Group] = {}  # by member
        self.ever_ran: set[int] = set()
        self.ahead: Plan | None = None

    @rule(
        count=st.integers(1, 5),
        length=st.integers(1, 40),
        odd=st.integers(0, 40),
        longest=st.integers(1, 40),
        priority=st.integers(-2, 2),
        patience=st.sampled_from([4.0, 40.0, inf, inf]),
        salt=st.sampled_from(["", "", "key"]),
        forks=st.sampled_from([0, 0, 0, 1, 3]),
        together=st.sampled_from([False, False, True]),
    )
    def arrive(self, count: int, odd: int, forks: int, priority: int, **kind: Any) -> None:
        for number in range(count):  # they differ in where, and whether, their prompts part
            self._arrive(
                odd=odd * (number + 1), forks=forks * (number == 0), priority=priority - number % 2, **kind
            )

    def _arrive(
        self,
        length: int,
        odd: int,
        longest: int,
        priority: int,
        patience: float,
        salt: str,
        forks: int,
        together: bool,
    ) -> None:
        seq = Sequence(
            next(self.ids),
            array("i", [int(i == odd) for i in range(length)]),
            SamplingParams(max_tokens=longest, n=1 + forks, speculate=not (together and forks)),
            priority=priority,
            arrival=self.now,
            deadline=self.now + patience,
            salt=salt,
        )
        fits = -(-(length + longest - 1) // SIZE) <= self.scheduler.blocks.allowed_blocks
        answers = sum(1 + self.forks_to_come[live] for live in self.live)
        most = self.settings.max_num_seqs + self.settings.max_queued_requests
        most_without_memory = self.scheduler.num_running + self.settings.max_queued_requests
        try:
            self.scheduler.add(seq)
        except CapacityError:
            assert not fits
            self.seen["refused"] += 1
        except BusyError:
            assert answers >= most or (self.scheduler.num_waiting and answers >= most_without_memory)
            self.seen["busy"] += 1
        else:
            assert fits and answers < most
            self.live[seq.id] = seq
            self.branch[seq.id] = 0
            self.forks_to_come[seq.id] = forks
            if together and forks:
                self.groups[seq.id] = Group(seq)

    @rule(steps=st.integers(1, 16))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    @rule(pick=st.integers(0, 99), seconds=st.floats(0, 20))
    def disturb(self, pick: int, seconds: float) -> None:
        """What may happen between steps; a step that fails is rare."""
        self._pass_time(seconds / 5)
        if pick < 50:
            self._cancel(pick)
        elif pick < 80:
            self._pass_time(seconds)
        elif pick < 86:
            if self.ahead is None:
                blocks = self.scheduler.blocks
                blocks.shrink(self.scheduler.tables())
                self.model.move(blocks.drain())
        elif pick < 96:
            blocks = self.scheduler.blocks
            blocks.set_limit(int(seconds / 20 * blocks.allowed_blocks))
            assert blocks.capacity <= blocks.max_blocks <= blocks.allowed_blocks
        else:
            self._fail()
        self.scheduler.check_integrity()

    def _draft(self, seq: Sequence, most: int) -> array[int]:
        """What will come, but for guesses that are wrong; sometimes less than is asked for, or nothing."""
        if not seq.params.speculate:
            return array("i")
        done, state = self.known.get(seq.id, (0, len(seq.salt)))
        for token in seq.tokens[done:]:
            state = following(state, token)
        self.known[seq.id], draft = (len(seq.tokens), state), array("i")
        while len(draft) < most and hash((state, 7)) % 8:
            token, _ = answer(state, self.branch[seq.id])
            if hash((state, 11)) % 100 >= 100 * self.right:
                token = 3
            draft.append(token)
            state = following(state, token)
        return draft

    def _cancel(self, pick: int) -> None:
        if self.live:
            seq_id = list(self.live)[pick % len(self.live)]
            output = self.scheduler.cancel(seq_id)
            assert output == Output(seq_id, "cancelled") and self.scheduler.cancel(seq_id) is None
            assert self.live.pop(seq_id).finish_reason == "cancelled"
            self._drop_group(seq_id)
            self.seen["cancelled"] += 1

    def _pass_time(self, seconds: float) -> None:
        self.now += seconds
        late = {output.seq_id for output in self.scheduler.expire(self.now)}
        for seq in list(self.live.values()):
            new = seq.id not in self.ever_ran and not self.branch[seq.id]
            waited = new and seq.arrival + self.settings.max_wait_s <= self.now
            assert (seq.id in late) == (seq.deadline <= self.now or waited)
            if seq.id in late:
                assert self.live.pop(seq.id).finish_reason == "timeout"
                self.groups.pop(seq.id, None)  # its others are as late
                self.seen["timeout"] += 1

    def _fail(self) -> None:
        self.ahead = None
        plan = self._schedule()
        self.model.slots = []
        ended = {output.seq_id for output in self.scheduler.abandon(plan)}
        assert ended == {item.seq_id for item in plan.items}
        for seq_id in ended:
            assert self.live.pop(seq_id).finish_reason == "error"
        for seq_id in ended:
            self._drop_group(seq_id)
        self.seen["failed"] += 1

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        work = sum(
            len(s.tokens) + s.params.max_tokens * (1 + self.forks_to_come[s.id]) for s in self.live.values()
        )
        for _ in range(10 * work * (3 if self.groups else 1)):
            if not self.live:
                break
            self._step()
        assert not self.live, f"{len(self.live)} requests never ended"
        assert len(self.scheduler) == 0 and not self.scheduler.schedule().items
        self.scheduler.check_integrity()
        usage = self.scheduler.usage()
        assert usage.used == usage.host_used == usage.wasted_slots == 0
        self.seen += Counter(self.scheduler.preempted)
        if prefix := self.scheduler.blocks.prefix:
            self.seen["hits"] += prefix.hit_tokens

    def _step(self) -> None:
        """One step; sometimes the one after it is planned, and its blocks moved, before it is committed."""
        plan, self.ahead = self.ahead or self._schedule(), None
        sent = as_sent(plan)
        self.model.move(plan)
        advances = list(self._advances(plan))
        go_alone = not any(item.seq_id in self.groups for item in plan.items)
        of_held = self._turns()
        if self.seen["steps"] % 3 and go_alone:
            leaving = {advance.seq_id for advance in advances if advance.finish_reason == "length"}
            self.ahead = self.scheduler.follow(plan, leaving)
            self.seen["ahead"] += self.ahead is not None
            left = self.scheduler.blocks.drain()
            assert left == Plan([], left.num_blocks), "a move is left for another plan"
            if self.ahead is not None:
                self._check_ahead(plan, self.ahead)
        for seq in self.scheduler.commit(plan, advances, of_held):
            self.live[seq.id] = seq
            if seq.finish_reason:
                self._ended(seq)
        assert as_sent(plan) == sent, (
            "a plan is what it was when it was made: it refers to nothing that goes on"
        )
        rows = plan.decodes + plan.drafted
        self.scheduler.speed.observe(plan, 0.5 + 0.1 * rows + 0.3 * plan.chunk_tokens)
        self.scheduler.check_integrity()
        self.seen["steps"] += 1
        self.seen["copies"] += len(plan.copies)
        self.seen["back"] += len(plan.swap_in)

    def _schedule(self) -> Plan:
        """A plan, checked to be within its budget and fair; who can never run is refused first."""
        for output in self.scheduler.refuse():
            assert -(-len(self.live.pop(output.seq_id).tokens) // SIZE) > self.scheduler.blocks.max_blocks
            self.seen["starved"] += 1
        waiting = {seq.id for seq in self.live.values() if seq.status == "waiting"}
        plan = self.scheduler.schedule()
        running = [seq for seq in self.live.values() if seq.status == "running"]
        assert sum(len(item.tokens) for item in plan.items) <= self.settings.max_num_batched_tokens
        assert len(running) == self.scheduler.num_running <= self.settings.max_num_seqs
        if not plan.items:  # whoever ran alone had to go, as memory did: it will be refused
            assert not self.live or (plan.preempted and not running)
        self._check_items(plan)
        self._check_time(plan)
        decoded = {item.seq_id for item in plan.items[: plan.decodes]}
        began_anew = waiting | {seq_id for seq_id, _ in plan.preempted}
        due = {
            seq.id
            for seq in running
            if seq.id not in began_anew and len(seq.tokens) - seq.num_computed_tokens == 1
        }
        assert due == decoded, "each sequence that may decode does so in every step"
        if running := [seq for seq in running if not self._is_held(seq)]:
            assert min(running, key=rank).id in {item.seq_id for item in plan.items}, "the first goes on"
        started = [rank(seq) for seq in running if seq.id in waiting]
        left = [rank(s) for s in self.live.values() if s.status == "waiting" and not self._is_held(s)]
        assert not started or not left or max(started) < min(left), "someone was overtaken"
        self.ever_ran |= {seq.id for seq in running}
        return plan

    def _check_items(self, plan: Plan) -> None:
        assert len({item.seq_id for item in plan.items}) == len(plan.items)
        for index, item in enumerate(plan.items):
            seq, end = self.live[item.seq_id], item.start + len(item.tokens)
            drafted = max(0, end - len(seq.tokens))
            assert item.start == seq.num_computed_tokens and item.tokens
            assert item.tokens == seq.tokens[item.start : end] + item.tokens[len(item.tokens) - drafted :]
            assert item.logit_rows == (drafted + 1 if end >= len(seq.tokens) else 0)
            assert len(item.block_table) * SIZE >= end and max(item.block_table) < plan.num_blocks
            assert len(item.tokens) == 1 + drafted if index < plan.decodes else not drafted
            assert end < seq.prompt_len + seq.params.max_tokens, "a token that is never needed is computed"
        decodes, chunks = plan.items[: plan.decodes], plan.items[plan.decodes :]
        assert plan.drafted == sum(len(item.tokens) - 1 for item in decodes)
        assert plan.decode_context == sum(item.start for item in decodes)
        assert plan.chunk_tokens == sum(len(item.tokens) for item in chunks)
        assert plan.chunk_context == sum(i.start + n for i in chunks for n in range(len(i.tokens)))

    def _check_time(self, plan: Plan) -> None:
        speed = self.scheduler.speed
        guess = speed.decode_ms(plan.decodes + plan.drafted, plan.decode_context)
        guess += sum(speed.chunk_ms(item.start, len(item.tokens)) for item in plan.items[plan.decodes :])
        within = guess <= self.settings.max_step_ms
        assert within or not plan.decodes or plan.chunk_tokens <= 8, "chunks took more than their time"

    def _advances(self, plan: Plan) -> Iterator[Advance]:
        for item in plan.items:
            seq = self.live.get(item.seq_id)
            if seq is None:  # planned ahead, and ended since
                for start in range(item.start, item.start + len(item.tokens)):
                    self.model.spoil(item._replace(start=start))
                self.seen["for nothing"] += 1
                yield Advance(item.seq_id, ())
                continue
            known = seq.tokens[item.start : item.start + len(item.tokens)]
            states = self.model.compute(item._replace(tokens=known + item.tokens[len(known) :]), seq)
            if item.logit_rows and seq.id in self.groups:
                self.groups[seq.id].states[seq.id] = states[-1]
                yield Advance(seq.id, ())
            elif item.logit_rows:
                forks = tuple(
                    self._forked(seq, states[-1], n + 1) for n in range(self.forks_to_come.pop(seq.id, 0))
                )
                self.forks_to_come[seq.id] = 0
                advance = self._advance(seq, seq.id, states[-item.logit_rows], forks)
                drafted = item.tokens[len(item.tokens) - item.logit_rows + 1 :]
                for guess, state in zip(drafted, states[len(states) - len(drafted) :], strict=True):
                    if advance.finish_reason or guess != list(advance.tokens)[-1]:
                        break
                    more = self._advance(seq, seq.id, state, made=len(advance.tokens))
                    advance = more._replace(tokens=(*advance.tokens, *more.tokens))
                self.seen["drafted"] += len(drafted) > 0
                self.seen["accepted"] += len(advance.tokens) > 1
                self.seen["rejected"] += len(advance.tokens) <= len(drafted)
                yield advance

    def _is_held(self, seq: Sequence) -> bool:
        return seq.id in self.groups and seq.id in self.groups[seq.id].states

    def _turns(self) -> list[Advance]:
        """Let those groups go on of which every sequence is held; those left behind end."""
        advances: list[Advance] = []
        for group in {id(group): group for group in self.groups.values()}.values():
            if len(group.states) == len(group.members):
                advances += self._turn(group)
            else:
                self.seen["held"] += len(group.states)
        return advances

    def _turn(self, group: Group) -> list[Advance]:
        parts: dict[int, list[Advance]] = {}
        members, made = list[int](), list[list[int]]()
        for place, token in survivors([group.states[id] for id in group.members], group.first.params.n):
            parent = group.members[place]
            own = parts.setdefault(parent, [])
            members.append(next(self.ids) if own else parent)
            own.append(Advance(members[-1], (token,)))
            made.append([*self.live[parent].tokens[group.first.prompt_len :], token])
            self.seen["parked"] += self.live[parent].status == "waiting"
        self.seen["turns"] += 1
        if len(made[0]) == group.first.params.max_tokens:
            assert made == group_alone(group.first), "other answers than alone"
            self._end_members(group.members)
            return []
        self._end_members([member for member in group.members if member not in parts])
        self.forks_to_come |= dict.fromkeys(members, 0)
        self.branch |= {member: 1 for member in members if member not in group.members}
        self.groups |= dict.fromkeys(members, group)
        group.members, group.states = members, {}
        return [first._replace(forks=tuple(forks)) for first, *forks in parts.values()]

    def _end_members(self, members: list[int]) -> None:
        for seq_id in members:
            self.scheduler.cancel(seq_id)
            del self.live[seq_id], self.groups[seq_id]
            self.seen["dead"] += 1

    def _drop_group(self, seq_id: int) -> None:
        """One of a group has ended by accident: so do the others."""
        if group := self.groups.pop(seq_id, None):
            members = [member for member in group.members if member in self.groups]
            self._end_members([member for member in members if member in self.live])
            for member in members:  # some have ended by the same accident
                self.groups.pop(member, None)

    def _advance(
        self, seq: Sequence, seq_id: int, state: int, forks: tuple[Advance, ...] = (), *, made: int = 0
    ) -> Advance:
        """The token after ``state``, and after ``made`` others of the same step."""
        token, ended = answer(state, self.branch[seq_id])
        full = len(seq.tokens) + made + 1 - seq.prompt_len == seq.params.max_tokens
        return Advance(seq_id, (token,), "stop" if ended else "length" if full else None, forks)

    def _forked(self, seq: Sequence, state: int, branch: int) -> Advance:
        self.seen["forks"] += 1
        seq_id = next(self.ids)
        self.branch[seq_id] = branch
        self.forks_to_come[seq_id] = 0
        return self._advance(seq, seq_id, state)

    def _check_ahead(self, plan: Plan, ahead: Plan) -> None:
        """Each token of a step planned ahead names the row of the step before that draws it."""
        for item in ahead.items:
            (token,) = item.tokens
            before = plan.items[-1 - token]
            assert (before.seq_id, before.start + 1) == (item.seq_id, item.start)

    def _ended(self, seq: Sequence) -> None:
        del self.live[seq.id]
        assert list(seq.tokens[seq.prompt_len :]) == alone(seq, self.branch[seq.id]), (
            "another answer than alone"
        )
        assert self.scheduler.sequence(seq.id) is None
        self.seen["answered"] += 1


def as_sent(plan: Plan) -> str:
    """The plan as text, as another process would get it."""
    return json.dumps(asdict(plan), default=list)


def rank(seq: Sequence) -> tuple[float, int]:
    """Who goes first: a level of priority is worth AGEING_S seconds of waiting."""
    return seq.arrival - seq.priority * AGEING_S, seq.id


def test_random_traffic_gets_the_answers_that_each_request_gets_alone() -> None:
    Traffic.seen.clear()
    Traffic.TestCase.settings = settings(max_examples=150, stateful_step_count=30)
    Traffic.TestCase("runTest").runTest()
    assert Traffic.seen["steps"] >= 10_000, Traffic.seen
    rare = {name: times for name in EVENTS if (times := Traffic.seen[name]) < 5}
    assert not rare, f"hardly ever seen: {rare}"
