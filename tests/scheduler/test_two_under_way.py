"""Random traffic with two steps under way: the answers that each request gets alone."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis.stateful import initialize
from test_traffic import EVENTS, Traffic

from tiny_llm.data import Plan

pytestmark = pytest.mark.slow


class TwoUnderWay(Traffic):
    """The same with two steps under way, of different sequences: as ranks that work in turns have it."""

    seen: ClassVar[Counter[str]] = Counter()

    @initialize()
    def begin(self) -> None:
        self.flight: list[Plan] = []

    def _fail(self) -> None:
        """A step that fails ends such ranks."""

    def _step(self) -> None:
        while len(self.flight) < 2 and (plan := self._beside()):
            self.flight.append(plan)
        if not self.flight:
            return
        plan = self.flight.pop(0)
        self.ahead = self.flight[0] if self.flight else None
        self.model.move(plan)
        advances = list(self._advances(plan))
        for seq in self.scheduler.commit(plan, advances, self._turns()):
            self.live[seq.id] = seq
            if seq.finish_reason:
                self._ended(seq)
        self.scheduler.check_integrity()
        self.seen["steps"] += 1
        self.seen["copies"] += len(plan.copies)
        self.seen["back"] += len(plan.swap_in)
        self.seen["ahead"] += self.ahead is not None

    def _beside(self) -> Plan | None:
        """Another plan, if there is one; alone who can never run is refused first."""
        for output in self.scheduler.refuse() if not self.flight else ():
            del self.live[output.seq_id]
            self.seen["starved"] += 1
        before = self.scheduler.num_running
        plan = self.scheduler.schedule(self.flight, groups=2)
        if not plan.items and not plan.preempted:
            assert not any((plan.swap_in, plan.swap_out, plan.copies)), "moves that nobody makes"
            return None
        assert plan.decodes <= -(-before // 2), "one of the two has more than its half"
        taken = {item.seq_id for other in self.flight for item in other.items}
        assert taken.isdisjoint(item.seq_id for item in plan.items), "two steps have one sequence"
        assert taken.isdisjoint(seq_id for seq_id, _ in plan.preempted), "it is under way and made room"
        self._check_items(plan)
        self.ever_ran |= {seq.id for seq in self.live.values() if seq.status == "running"}
        return plan


def test_two_steps_under_way_give_the_answers_that_each_request_gets_alone() -> None:
    TwoUnderWay.seen.clear()
    TwoUnderWay.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
    TwoUnderWay.TestCase("runTest").runTest()
    assert TwoUnderWay.seen["steps"] >= 2_000, TwoUnderWay.seen
    rare = {name for name in EVENTS if name != "failed" and TwoUnderWay.seen[name] < 2}
    assert not rare, f"hardly ever seen: {rare}"
