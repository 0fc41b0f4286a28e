"""An action is asked for, noted, done once, and proved: whatever moment the process ends at."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from tiny_llm.agent.action import Actions, AgentTool, Arguments, Outcome, Prepared
from tiny_llm.agent.history import Proposal, RunHistory
from tiny_llm.agent.loop import Agent, Budget
from tiny_llm.agent.workspace import digest_of
from tiny_llm.errors import RequestError

pytestmark = pytest.mark.chapter("3.8")


class Killed(BaseException):
    """The process is gone: nothing of ours catches this."""


class _Put(Arguments):
    name: str
    value: str


class _Look(Arguments):
    name: str


class _Push(Arguments):
    value: str


class Noted:
    """A log in memory that a kill leaves as it is."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self._world = folder, world
        self.records: list[Mapping[str, Any]] = [{"kind": "begin", "task": "do it", "worked_s": 0.0}]

    def append(self, kind: str, **said: Any) -> Mapping[str, Any]:
        """Add a record, unless the process ends before; it may end right after, too."""
        self._world.moment(f"before {kind}")
        self.records.append(copy.deepcopy({"kind": kind, **said}))
        self._world.moment(f"after {kind}")
        return self.records[-1]


class World:
    """Values by name: put changes one, look shows it. Push adds to a list, and foretells no digest."""

    def __init__(self, folder: Path) -> None:
        self.values: dict[str, str] = {"a": "one"}
        self.pushed: list[str] = []
        self.done: list[str] = []
        self.asked: list[Prepared] = []
        self.moments: list[str] = []
        self.dies_at = -1
        self.model: Speaking
        self.answer = ""
        self.log = Noted(folder, self)
        effect: dict[str, Any] = {"has_effect": True}
        put = AgentTool.of("put", "", _Put, self._put, digest=lambda g: self._digest(g.name), **effect)
        push = AgentTool.of("push", "", _Push, self._push, digest=lambda _: self._pushes(), **effect)
        look = AgentTool.of("look", "", _Look, self._look)
        self.actions = Actions([put, push, look])

    def moment(self, name: str) -> None:
        """Something at which the process may end."""
        self.moments.append(name)
        if len(self.moments) - 1 == self.dies_at:
            raise Killed(name)

    def _digest(self, name: str) -> str:
        return digest_of(self.values[name].encode()) if name in self.values else ""

    def _pushes(self) -> str:
        return digest_of(repr(self.pushed).encode())

    def _put(self, given: _Put) -> Prepared:
        if given.name == "locked":
            raise RequestError("locked cannot be changed.")
        if self.values.get(given.name) == given.value:
            raise RequestError(f"{given.name} is that already.")
        before, after = self._digest(given.name), digest_of(given.value.encode())

        def perform() -> Outcome:
            self.moment("before the effect")
            if given.value == "fails":
                self.values[given.name] = "half"
                raise RequestError("the disk is full.")
            self.values[given.name] = given.value
            self.done.append(f"put {given.name}")
            self.moment("after the effect")
            return Outcome(f"{given.name} is changed.", 0, after)

        return Prepared(f"put {given.name}", perform, "-old\n+new" * 2000, before, after)

    def _push(self, given: _Push) -> Prepared:
        def perform() -> Outcome:
            self.pushed.append(given.value)
            self.done.append("push")
            self.moment("after the effect")
            return Outcome("pushed", 0, self._pushes())

        return Prepared("push", perform, "", self._pushes())

    def _look(self, given: _Look) -> Prepared:
        if given.name not in self.values:
            raise RequestError(f"{given.name} is not there.")
        self.done.append(f"prepare {given.name}")
        return Prepared(f"look {given.name}", lambda: Outcome(self.values[given.name]))

    def approve(self, prepared: Prepared) -> str:
        self.asked.append(prepared)
        self.moment("asked")
        return self.answer

    def run(self, *said: Any, **options: Any) -> Agent:
        """A process: it goes on from what the log has. It says one thing for each step of the history."""
        self.model = Speaking(said)
        log, budget = cast(Any, self.log), Budget(**options)
        agent = Agent(log, self.actions, self.model, budget, self.approve, lambda _: None)
        agent.run()
        return agent

    def kinds(self) -> list[str]:
        return [record["kind"] for record in self.log.records]

    def receipts(self) -> list[Mapping[str, Any]]:
        return [record for record in self.log.records if record["kind"] == "receipt"]


class Speaking:
    """A model by a list, or by a function of the history."""

    room = 10_000

    def __init__(self, said: Sequence[Any]) -> None:
        self._said = said

    def size(self, history: RunHistory) -> int:
        return 1

    def propose(self, history: RunHistory, seconds: float) -> Proposal:
        said = self._said[len(history.steps)]
        said = said(history) if callable(said) else said
        if isinstance(said, str):
            return Proposal(None, said)
        return Proposal({"name": said[0], "arguments": said[1]}, "")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


PUT, LOOK = ("put", {"name": "a", "value": "two"}), ("look", {"name": "a"})
PUSH = ("push", {"value": "x"})
ONE, TWO = digest_of(b"one"), digest_of(b"two")


def told(record: Mapping[str, Any], *names: str) -> list[Any]:
    return [record[name] for name in names]


def test_an_effect_is_asked_for_noted_before_and_proved_after(world: World) -> None:
    world.run(PUT, "done")
    assert world.kinds() == ["begin", "action", "intent", "receipt", "end"]
    effect = ["before the effect", "after the effect"]
    order = ["asked", "before intent", "after intent", *effect, "before receipt"]
    assert [name for name in world.moments if name in order] == order, "the note is there before the effect"
    intent, receipt = world.log.records[2:4]
    assert told(intent, "what", "before", "after") == ["put a", ONE, TWO]
    assert told(receipt, "what", "before", "after", "exit") == ["put a", ONE, TWO, 0]
    assert world.asked[0].what == "put a" and world.values == {"a": "two"}


def test_an_effect_that_shows_nothing_is_asked_for_too(world: World) -> None:
    world.run(PUSH, "done")
    assert [one.what for one in world.asked] == ["push"] and world.kinds()[2] == "intent"


def test_a_mistake_of_ours_is_no_result(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a program that is broken would be the model's fault, step after step."""
    monkeypatch.setattr(World, "_digest", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        world.run(PUT, "done")


def test_a_preview_in_the_log_is_bounded(world: World) -> None:
    world.run(PUT, "done")
    preview = world.log.records[2]["preview"]
    assert len(world.asked[0].preview) > 6000, "the user sees all of it"
    assert len(preview) == 6000 and preview.startswith("-old\n+new")


def test_what_has_no_effect_is_not_asked_for(world: World) -> None:
    world.run(LOOK, "done")
    assert world.kinds() == ["begin", "action", "receipt", "end"] and not world.asked
    (receipt,) = world.receipts()
    assert told(receipt, "what", "shown", "before", "after", "exit") == ["look a", "one", "", "", None]


@pytest.mark.parametrize("why", ["not today", "no", "y", " "])
def test_what_is_refused_is_not_done_and_the_model_is_told(world: World, why: str) -> None:
    world.answer = why
    world.run(PUT, "done")
    assert world.values == {"a": "one"} and world.kinds() == ["begin", "action", "receipt", "end"]
    (receipt,) = world.receipts()
    assert told(receipt, "what", "shown", "before", "after") == ["put a", f"refused: {why}", ONE, ONE]
    assert receipt["exit"] is None, "nothing ran"


def test_the_time_that_the_user_thinks_is_not_the_runs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def thinks(prepared: Prepared) -> str:
        now[0] += 10_000
        return ""

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(world, "approve", thinks)
    ended = world.run(PUT, "done", seconds=60).ended
    assert ended is not None and (ended["reason"], ended["worked_s"]) == ("finished", 0)


def test_what_cannot_be_done_is_not_asked_for(world: World) -> None:
    world.run(("put", {"name": "locked", "value": "x"}), ("look", {"name": "z"}), "done")
    assert not world.asked and "intent" not in world.kinds()
    for receipt, name, why in zip(
        world.receipts(), ("put", "look"), ("locked cannot be changed.", "z is not there."), strict=True
    ):
        assert told(receipt, "what", "shown", "exit") == [name, f"error: {why}", 1]


def test_an_effect_that_failed_is_told_with_what_it_left(world: World) -> None:
    world.run(("put", {"name": "a", "value": "fails"}), "done")
    (receipt,) = world.receipts()
    assert told(receipt, "shown", "exit") == ["error: the disk is full.", 1]
    assert told(receipt, "before", "after") == [ONE, digest_of(b"half")], "as it is now, not as it was to be"


def test_what_was_done_before_is_not_done_again(world: World) -> None:
    ended = world.run(LOOK, LOOK, "done").ended
    assert ended is not None and ended["reason"] == "repeated"
    first, second = world.receipts()
    assert world.done == ["prepare a"], "it is not even prepared"
    assert first["shown"] == "one" and second["repeated"] and "repeated" not in first
    assert second["what"] == "repeat look" and second["shown"].startswith("This was done before")


def test_who_repeats_an_effect_is_not_asked_again(world: World) -> None:
    world.answer = "no"
    world.run(PUT, PUT, "done")
    assert len(world.asked) == 1 and world.values == {"a": "one"}


def test_after_a_change_the_same_action_is_another(world: World) -> None:
    ended = world.run(LOOK, PUT, LOOK, "done").ended
    assert ended is not None and ended["reason"] == "finished"
    assert [receipt["shown"] for receipt in world.receipts()] == ["one", "a is changed.", "two"]


def test_the_same_in_another_order_is_the_same(world: World) -> None:
    other = ("put", dict(reversed(PUT[1].items())))
    world.answer = "no"
    ended = world.run(PUT, other, "done").ended
    assert ended is not None and ended["reason"] == "repeated"


def test_a_kill_at_any_moment_and_each_thing_is_done_once(tmp_path: Path) -> None:
    """The process ends at each moment in turn, and another goes on with the log that it left."""
    (tmp_path / "whole").mkdir()
    whole = World(tmp_path / "whole")

    def speaks(history: RunHistory) -> Any:
        """What is not done yet, by the world as it is."""
        for name, value in (("a", "two"), ("b", "three")):
            if world.values.get(name) != value:
                return "put", {"name": name, "value": value}
        return "done"

    world = whole
    whole.run(*[speaks] * 9)
    assert whole.done == ["put a", "put b"] and whole.values["b"] == "three"
    for number, moment in enumerate(whole.moments):
        (folder := tmp_path / str(number)).mkdir()
        world = World(folder)
        world.dies_at = number
        with pytest.raises(Killed):
            world.run(*[speaks] * 9)
        world.dies_at = -1
        ended = world.run(*[speaks] * 9).ended
        assert ended is not None and ended["reason"] == "finished", moment
        assert world.done == ["put a", "put b"], f"killed {moment}"
        digests = [told(one, "before", "after") for one in world.receipts()]
        changes = [[before, after] for before, after in digests if before != after]
        assert changes == [[ONE, TWO], ["", digest_of(b"three")]], (
            f"killed {moment}: a receipt for each change"
        )


def killed(world: World, *said: Any, at: str) -> None:
    """A run whose process ends at the first moment of that name."""
    (folder := world.log.folder / "probe").mkdir()
    probe = World(folder)
    probe.run(*said)
    world.dies_at = probe.moments.index(at)
    with pytest.raises(Killed):
        world.run(*said)
    world.dies_at = -1
    world.asked.clear()


@pytest.mark.parametrize(
    ("at", "what", "after"),
    [
        ("after the effect", "it was done", TWO),
        ("before receipt", "it was done", TWO),
        ("before the effect", "it was not done", ONE),
        ("after intent", "it was not done", ONE),
    ],
)
def test_what_became_of_an_edit_is_seen(world: World, at: str, what: str, after: str) -> None:
    killed(world, PUT, "done", at=at)
    world.run(PUT, "done")
    (receipt,) = world.receipts()
    assert receipt["shown"] == f"The run was interrupted during this: {what}."
    assert told(receipt, "what", "before", "after", "exit", "recovered") == ["put a", ONE, after, None, True]
    assert not world.asked, "it is not done again by itself, so nobody is asked"


@pytest.mark.parametrize(("at", "what"), [("after intent", "not done"), ("after the effect", "done")])
def test_what_became_of_a_new_file_is_seen(world: World, at: str, what: str) -> None:
    new = ("put", {"name": "b", "value": "two"})
    killed(world, new, "done", at=at)
    world.run(new, "done")
    (receipt,) = world.receipts()
    assert receipt["shown"].endswith(f"it was {what}.")
    assert told(receipt, "before", "after") == ["", TWO if what == "done" else ""]


@pytest.mark.parametrize("at", ["after the effect", "after intent"])
def test_of_what_cannot_be_foretold_nobody_knows(world: World, at: str) -> None:
    """A command may have run or not; equal digests prove nothing, as it may do other things."""
    killed(world, PUSH, "done", at=at)
    world.run(PUSH, "done")
    (receipt,) = world.receipts()
    assert receipt["shown"].endswith("it may have been done, in part or whole.") and receipt["recovered"]
    assert receipt["after"] == digest_of(repr(world.pushed).encode()), "as it is now"
    assert world.done.count("push") == (at == "after the effect")


def test_what_somebody_else_has_changed_meanwhile_is_not_known_either(world: World) -> None:
    killed(world, PUT, "done", at="after intent")
    world.values["a"] = "theirs"
    world.run(PUT, "done")
    (receipt,) = world.receipts()
    assert receipt["shown"].endswith("it may have been done, in part or whole.")
    assert told(receipt, "before", "after") == [ONE, digest_of(b"theirs")]


def test_what_cannot_be_read_any_more_ends_no_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may lie there by now, or a file of gigabytes: the run goes on all the same."""
    killed(world, ("put", {"name": "b", "value": "two"}), "done", at="after intent")

    def fails(*_: object) -> str:
        raise RequestError("b is no plain file.")

    with monkeypatch.context() as patched:
        patched.setattr(World, "_digest", fails)
        assert world.run("no more", "done").ended is not None
    (receipt,) = world.receipts()
    assert receipt["shown"].endswith("it may have been done, in part or whole.")
    assert told(receipt, "before", "after") == ["", "?"], (
        "neither done nor not done, though there was none before"
    )


def test_what_was_interrupted_may_be_done_again(world: World) -> None:
    killed(world, PUT, "done", at="after intent")
    ended = world.run(PUT, PUT, "done").ended
    assert ended is not None and ended["reason"] == "finished", "no repeat: it was not done"
    assert [one.what for one in world.asked] == ["put a"] and world.values == {"a": "two"}


@pytest.mark.parametrize("at", ["after action", "asked", "before intent"])
def test_what_was_only_proposed_is_asked_for(world: World, at: str) -> None:
    killed(world, PUT, "done", at=at)
    world.run(PUT, "done")
    assert [one.what for one in world.asked] == ["put a"] and world.done == ["put a"]
    assert "recovered" not in world.receipts()[0]


def test_what_was_proposed_is_prepared_anew(world: World) -> None:
    """The user may have changed the file between: the diff that is shown is the one of now."""
    killed(world, PUT, "done", at="asked")
    world.values["a"] = "theirs"
    world.run(PUT, "done")
    assert world.asked[0].before == digest_of(b"theirs") == world.receipts()[0]["before"]


def test_a_receipt_is_kept_and_named(world: World) -> None:
    world.values["a"] = "word " * 5000
    world.run(LOOK, "done")
    (receipt,) = world.receipts()
    kept = (world.log.folder / "results" / receipt["result"]).read_text()
    assert kept == world.values["a"] and len(receipt["shown"]) < 6000 < len(kept)
