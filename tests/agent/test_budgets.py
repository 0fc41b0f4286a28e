"""One proposal of the loop, and when it makes none: by records in memory, without a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from tiny_llm.agent.action import Actions, AgentTool, Arguments, Outcome, Prepared
from tiny_llm.agent.history import Proposal, RunHistory
from tiny_llm.agent.loop import Agent, Budget

pytestmark = pytest.mark.chapter("3.7")


class _Expression(Arguments):
    expression: str


class Noted:
    """A log in memory."""

    def __init__(self, folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
        self.folder, self.records = folder, list(records)

    def append(self, kind: str, **said: Any) -> Mapping[str, Any]:
        self.records.append({"kind": kind, **said})
        return self.records[-1]


class Saying:
    """A model that says one thing after the other, and remembers what it was asked."""

    def __init__(self, said: Sequence[Proposal], room: int, size: Callable[[RunHistory], int]) -> None:
        self._said, self.room, self.size = iter(said), room, size
        self.asked: list[tuple[RunHistory, float]] = []

    def propose(self, history: RunHistory, seconds: float) -> Proposal:
        self.asked.append((history, seconds))
        return next(self._said)


ADD = {"name": "add", "arguments": {"expression": "1 + 1"}}
BEGIN = {"kind": "begin", "task": "do it", "worked_s": 0.0}


def added(number: int = 1, **counts: Any) -> list[dict[str, Any]]:
    """The records of an action that was done."""
    action = {"name": "add", "arguments": {"expression": f"{number}"}}
    told = {"what": "add", "before": "", "after": "", "exit": None, "result": "0", "shown": "2"}
    return [
        {"kind": "action", "action": action, "said": "", "worked_s": 0.0, **counts},
        {"kind": "receipt", **told, "worked_s": 0.0},
    ]


def faults(number: int) -> list[dict[str, Any]]:
    """The records of so many that were no actions."""
    return [{"kind": "malformed", "said": "?", "fault": "none", "worked_s": 0.0}] * number


class Bed:
    """An agent on a log in memory, and what it is made of."""

    def __init__(
        self,
        folder: Path,
        *records: Mapping[str, Any],
        said: Sequence[Proposal] = (),
        budget: Budget | None = None,
        room: int = 10_000,
        size: Callable[[RunHistory], int] = lambda history: 100,
    ) -> None:
        self.log = Noted(folder, [BEGIN, *records])
        self.prepared: list[Any] = []
        self.model = Saying(said, room, size)
        actions = Actions([AgentTool.of("add", "", _Expression, self._prepare)])
        self.agent = Agent(
            cast(Any, self.log), actions, self.model, budget or Budget(), lambda _: "", lambda _: None
        )
        self._began = len(self.log.records)

    def _prepare(self, given: Any) -> Prepared:
        self.prepared.append(given)
        return Prepared("add", lambda: Outcome("2"))

    @property
    def noted(self) -> list[dict[str, Any]]:
        """What was noted since, without the time."""
        new = self.log.records[self._began :]
        return [{key: value for key, value in one.items() if key != "worked_s"} for one in new]

    def propose(self) -> list[dict[str, Any]]:
        """What one proposal notes."""
        self.agent._propose()
        return self.noted


COUNTS = {"prompt_tokens": 70, "tokens": 9, "cached_tokens": 64}


def test_an_action_is_noted_with_its_tokens_and_not_yet_done(tmp_path: Path) -> None:
    bed = Bed(tmp_path, said=[Proposal(ADD, "why", "", 70, 9, 64)])
    assert bed.propose() == [{"kind": "action", "action": ADD, "said": "why", **COUNTS}]
    assert (bed.agent.steps, bed.agent.tokens, bed.agent.ended) == (1, 15, None)
    assert not bed.prepared, "what it does comes after the note"


def test_an_answer_ends_the_run(tmp_path: Path) -> None:
    bed = Bed(tmp_path, said=[Proposal(None, "It is 2.", "", 70, 9, 64)])
    assert bed.propose() == [{"kind": "end", "reason": "finished", "answer": "It is 2.", **COUNTS}]
    assert bed.agent.ended is not None and bed.agent.steps == 0


def test_an_empty_answer_is_one_too(tmp_path: Path) -> None:
    (noted,) = Bed(tmp_path, said=[Proposal(None, "")]).propose()
    assert (noted["kind"], noted["reason"], noted["answer"]) == ("end", "finished", "")


@pytest.mark.parametrize("action", [None, ADD, {"name": "launch", "arguments": {}}])
def test_what_the_model_calls_a_fault_is_none_of_an_action(tmp_path: Path, action: Any) -> None:
    bed = Bed(tmp_path, said=[Proposal(action, "It is", "it was cut", 70, 9, 64)])
    made = {"kind": "malformed", "said": "It is", "action": action, "fault": "it was cut"}
    assert bed.propose() == [made | COUNTS]
    assert bed.agent.ended is None and bed.agent.steps == 1 and not bed.prepared


@pytest.mark.parametrize(
    ("action", "fault"),
    [
        ({"name": "launch", "arguments": {}}, "There is no action 'launch'"),
        ({"name": "add", "arguments": {}}, "add: expression: Field required."),
        ({"name": "add", "arguments": {"expression": 7}}, "add: expression: "),
        ({"name": ["add"]}, "There is no action ['add']"),
    ],
)
def test_an_action_that_is_none_is_told_to_the_model(tmp_path: Path, action: Any, fault: str) -> None:
    bed = Bed(tmp_path, said=[Proposal(action, "why", "", 70, 9, 64), Proposal(None, "done")])
    (noted,) = bed.propose()
    assert (noted["kind"], noted["said"], noted["action"]) == ("malformed", "why", action)
    assert noted["fault"].startswith(fault) and {name: noted[name] for name in COUNTS} == COUNTS
    assert not bed.prepared and bed.agent.steps == 1
    bed.propose()
    assert fault in bed.model.asked[1][0].steps[0].shown, "the next proposal knows why"


def test_a_long_fault_is_cut(tmp_path: Path) -> None:
    bed = Bed(tmp_path, said=[Proposal(None, "x" * 100_000, "it was cut")])
    assert bed.propose()[0]["said"] == "x" * 6000
    whole = Bed(tmp_path, said=[Proposal(None, "x" * 100_000)])
    assert len(whole.propose()[0]["answer"]) == 100_000, "an answer is the user's"


def test_the_model_knows_how_much_time_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    bed = Bed(tmp_path, said=[Proposal(ADD, "")] * 2, budget=Budget(seconds=60))
    for now[0] in (13.5, 59.75):
        bed.propose()
    assert [seconds for _, seconds in bed.model.asked] == [46.5, 0.25]


def by_steps(history: RunHistory) -> int:
    """100 tokens a step that is told whole, 10 one in short form, and 100 for the task."""
    return 100 + 100 * (len(history.steps) - history.short) + 10 * history.short


def long(steps: int) -> list[dict[str, Any]]:
    return [record for number in range(steps) for record in added(number)]


def test_a_history_that_fits_is_told_whole(tmp_path: Path) -> None:
    bed = Bed(tmp_path, *long(5), said=[Proposal(ADD, "")], room=800, size=by_steps)
    assert [one["kind"] for one in bed.propose()] == ["action"]
    assert bed.model.asked[0][0].short == 0


def test_a_long_history_is_told_in_short_and_that_is_noted(tmp_path: Path) -> None:
    bed = Bed(tmp_path, *long(6), said=[Proposal(ADD, ""), Proposal(ADD, "")], room=800, size=by_steps)
    compact, action = bed.propose()
    assert compact == {"kind": "compact", "short": 4} and action["kind"] == "action"
    assert bed.model.asked[0][0].short == 4 == bed.agent.history.short
    assert [one["kind"] for one in bed.propose()][2:] == ["action"], "it fits now: nothing is made shorter"


@pytest.mark.parametrize(("room", "fits"), [(100, True), (99, False)])
def test_what_has_no_room_is_not_asked(tmp_path: Path, room: int, fits: bool) -> None:
    bed = Bed(tmp_path, said=[Proposal(ADD, "")], room=room, size=by_steps)
    (noted,) = bed.propose()
    assert len(bed.model.asked) == fits
    if not fits:
        assert noted == {"kind": "end", "reason": "context", "answer": "", "size": 100, "room": 99}
        assert bed.agent.ended is not None


def test_what_has_no_room_even_in_short_says_its_size(tmp_path: Path) -> None:
    """The last step stays whole: 100 + 100 + 10."""
    bed = Bed(tmp_path, *long(2), room=150, size=by_steps)
    assert bed.propose() == [
        {"kind": "compact", "short": 1},
        {"kind": "end", "reason": "context", "answer": "", "size": 210, "room": 150},
    ]


def spent(folder: Path, *records: Mapping[str, Any], **budget: Any) -> str:
    return Bed(folder, *records, budget=Budget(**budget)).agent._spent()


def test_nothing_is_spent_at_the_beginning(tmp_path: Path) -> None:
    assert spent(tmp_path) == "" and spent(tmp_path, steps=1, tokens=1, seconds=60) == ""


@pytest.mark.parametrize(("number", "reason"), [(1, ""), (2, ""), (3, "malformed"), (4, "malformed")])
def test_three_faults_in_a_row_end_it(tmp_path: Path, number: int, reason: str) -> None:
    assert spent(tmp_path, *faults(number)) == reason
    assert spent(tmp_path, *faults(2), *added(), *faults(number)) == reason, "an action in between counts"


def test_what_is_done_twice_ends_it(tmp_path: Path) -> None:
    assert spent(tmp_path, *added(1), *added(2), *added(3)) == ""
    assert spent(tmp_path, *added(1), *added(2), *added(1)) == "repeated", "whichever it is"
    assert spent(tmp_path, *added(1), *added(2), *added(2)) == "repeated"


@pytest.mark.parametrize(("most", "reason"), [(1, "steps"), (2, "steps"), (3, ""), (30, "")])
def test_so_many_steps_and_no_more(tmp_path: Path, most: int, reason: str) -> None:
    assert spent(tmp_path, *added(1), *added(2), steps=most) == reason
    assert spent(tmp_path, *added(1), *faults(1), steps=most) == reason, "what was no action is one, too"


@pytest.mark.parametrize(("most", "reason"), [(29, "tokens"), (30, "tokens"), (31, "")])
def test_what_the_cache_had_is_free(tmp_path: Path, most: int, reason: str) -> None:
    records = [*added(1, prompt_tokens=90, cached_tokens=90, tokens=20), *added(2, tokens=10)]
    assert spent(tmp_path, *records, tokens=most) == reason


@pytest.mark.parametrize(
    ("worked", "passed", "reason"),
    [(20, 39, ""), (20, 39.5, ""), (20, 40, "seconds"), (60, 0, "seconds"), (0, 61, "seconds")],
)
def test_the_time_before_and_the_time_since_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worked: float, passed: float, reason: str
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    hint = {"kind": "hint", "text": "quick", "worked_s": worked}
    agent = Bed(tmp_path, hint, budget=Budget(seconds=60)).agent
    now[0] += passed
    assert agent._spent() == reason


def test_the_first_reason_is_told(tmp_path: Path) -> None:
    """Those that say what the model did wrong come before those that a larger budget would mend."""
    twice = [*added(1, tokens=5), *added(1, tokens=5)]
    all_of_it = [*twice, *faults(3)]
    nothing = {"steps": 1, "tokens": 1, "seconds": 0.0}
    assert spent(tmp_path, *all_of_it, **nothing) == "malformed"
    assert spent(tmp_path, *twice, **nothing) == "repeated"
    assert spent(tmp_path, *added(1, tokens=5), **nothing) == "steps"
    assert spent(tmp_path, *added(1, tokens=5), tokens=1, seconds=0.0) == "tokens"
    assert spent(tmp_path, *added(1, tokens=5), seconds=0.0) == "seconds"


def test_whoever_obeys_a_result_gets_no_further_than_the_check(tmp_path: Path) -> None:
    """The whole loop: the order in the result is obeyed three times, and nothing is prepared by it."""
    order = {"name": "shell", "arguments": {"command": "curl evil"}}
    bed = Bed(tmp_path, said=[Proposal(ADD, ""), *[Proposal(order, "as it says")] * 3])
    assert bed.agent.run()["reason"] == "malformed"
    assert [given.expression for given in bed.prepared] == ["1 + 1"]
    assert json.dumps(bed.noted).count("There is no action 'shell'") == 3
