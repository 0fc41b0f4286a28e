"""Ways go on from one history, each by itself; what they left is judged, and the best is taken."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tiny_llm.agent.action import Actions, AgentTool, Arguments, Outcome, Prepared
from tiny_llm.agent.fork import Way, keep, try_ways
from tiny_llm.agent.history import Proposal, RunHistory
from tiny_llm.agent.loop import Agent, Budget, begin
from tiny_llm.agent.receipts import Log, read_log
from tiny_llm.agent.workspace import Workspace, digest_of
from tiny_llm.errors import RequestError

pytestmark = pytest.mark.chapter("3.9")


class _Text(Arguments):
    text: str


class Player:
    """A model that says what a function of its workspace and history does, and what its prompts cost."""

    room = 10_000

    def __init__(self, plays: Callable[[Path, RunHistory], str | None], root: Path) -> None:
        self._plays, self._root = plays, root
        self.seen: list[RunHistory] = []

    def size(self, history: RunHistory) -> int:
        return 1

    def propose(self, history: RunHistory, seconds: float) -> Proposal:
        """None ends the run; else it is noted by an action of that text."""
        self.seen.append(history)
        said = self._plays(self._root, history)
        counts = 100 + len(history.steps), 10, 60 + len(history.steps)
        if said is None:
            return Proposal(None, "done", "", *counts)
        return Proposal({"name": "note", "arguments": {"text": said}}, "", "", *counts)


class Bed:
    """A run whose log lies in ``folder``, in a workspace."""

    def __init__(self, place: Path) -> None:
        self.root, self.folder = place / "work", place / "run"
        self.root.mkdir()
        self.players: list[Player] = []
        self.starts: list[tuple[list[str], int, float]] = []
        self.plays: Callable[[Path, RunHistory], str | None] = lambda root, history: None
        self.budget = Budget()

    def start(self, log: Log, workspace: Workspace) -> Agent:
        note = AgentTool.of("note", "", _Text, lambda given: Prepared("note", lambda: Outcome(given.text)))
        self.players.append(Player(self.plays, workspace.root))
        approve, show = (lambda _: ""), (lambda _: None)
        agent = Agent(log, Actions([note]), self.players[-1], self.budget, approve, show)
        self.starts.append(([one["kind"] for one in log.records], agent.tokens, agent._worked))
        return agent

    def ways(self, *hints: str, check: Callable[[Workspace], bool] = lambda _: True) -> list[Way]:
        with Workspace(self.root) as workspace, Log(self.folder) as log:
            if not log.records:
                begin(log, "do it")
            return try_ways(log, workspace, hints, self.start, check)

    def keep(self, way: Way, approve: Callable[[Prepared], str] = lambda _: "") -> int:
        with Workspace(self.root) as workspace, Log(self.folder) as log:
            return keep(way, log, workspace, approve)

    def texts(self) -> dict[str, str]:
        files = [path for path in sorted(self.root.rglob("*")) if path.is_file()]
        return {path.relative_to(self.root).as_posix(): path.read_text() for path in files}


@pytest.fixture
def bed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bed:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power is cut here
    return Bed(tmp_path)


def does(**by_hint: Sequence[Callable[[Path], object]]) -> Callable[[Path, RunHistory], str | None]:
    """For each hint things to do in the workspace, one a step."""

    def plays(root: Path, history: RunHistory) -> str | None:
        (hint,) = (hint for hint in by_hint if hint in history.task)
        if len(history.steps) == len(by_hint[hint]):
            return None
        by_hint[hint][len(history.steps)](root)
        return f"{hint} {len(history.steps)}"

    return plays


def writes(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(text)


def test_a_way_has_a_folder_of_its_own(bed: Bed) -> None:
    (bed.root / "sub").mkdir()
    (bed.root / "sub" / "a").write_text("one")
    bed.plays = does(left=[writes("sub/a", "left")], right=[writes("b", "right")])
    left, right = bed.ways("left", "right")
    assert (left.folder / "workspace" / "sub" / "a").read_text() == "left"
    assert (right.folder / "workspace" / "sub" / "a").read_text() == "one", "no way sees another's work"
    assert not (left.folder / "workspace" / "b").exists()
    assert bed.texts() == {"sub/a": "one"}, "nor does the workspace"
    assert left.folder.parent == right.folder.parent == bed.folder
    assert (left.folder.name, right.folder.name) == ("way1", "way2"), "behind the one record that there was"


def test_what_is_left_out_of_a_workspace_is_not_copied_and_no_link_is_followed(bed: Bed) -> None:
    for name in (".git", "sub/.venv"):
        (bed.root / name).mkdir(parents=True)
        (bed.root / name / "x").write_text("x")
    (bed.root.parent / "secret").write_text("key")
    (bed.root / "link").symlink_to("../secret")
    (bed.root / "a").write_text("one")
    (bed.root / "a").chmod(0o755)
    (way,) = bed.ways("")
    copied = way.folder / "workspace"
    assert (copied / "a").stat().st_mode & 0o777 == 0o755, "what could be run can be run"
    assert sorted(path.name for path in copied.iterdir()) == ["a", "link", "sub"]
    assert list((copied / "sub").iterdir()) == []
    assert (copied / "link").is_symlink() and "key" not in [p.read_text() for p in copied.glob("a*")]


def test_all_ways_begin_from_the_same_history(bed: Bed) -> None:
    """What an earlier way took is not on the account of a later one: steps, tokens, seconds, or lines."""
    bed.plays = does(one=[writes("a", "x")] * 3, two=[], three=[])
    ways = bed.ways("one", "two", "three")
    assert bed.starts == [(["begin"], 0, 0.0)] * 3
    prefix = read_log(bed.folder)[:1]
    assert all(read_log(way.folder)[:1] == prefix for way in ways)
    assert {way.hint: way.steps for way in ways} == {"one": 3, "two": 0, "three": 0}


def test_what_is_done_in_the_workspace_while_a_way_runs_is_in_no_other(bed: Bed) -> None:
    (bed.root / "a").write_text("one")
    bed.plays = does(first=[lambda _: (bed.root / "a").write_text("theirs")], second=[])
    bed.ways("first", "second")
    copies = [path.read_text() for path in sorted(bed.folder.glob("way*/workspace/a"))]
    assert copies == ["one", "one"] and bed.texts() == {"a": "theirs"}


def with_history(bed: Bed) -> None:
    """Two steps that all ways share."""
    bed.plays, bed.budget = lambda _, history: f"{len(history.steps)}", Budget(steps=2)
    with Workspace(bed.root) as workspace, Log(bed.folder) as log:
        begin(log, "do it")
        bed.start(log, workspace).run()
    bed.players.clear()
    bed.starts.clear()
    bed.plays, bed.budget = lambda _, __: None, Budget()


def test_a_way_goes_on_from_what_there_is(bed: Bed) -> None:
    with_history(bed)
    assert len(list((bed.folder / "results").iterdir())) == 2
    ways = bed.ways("Be quick.", "Take care.")
    before = [one["kind"] for one in read_log(bed.folder)][:-2]
    assert bed.starts == [(before, 100, bed.starts[0][2])] * 2 and before[-1] == "end"
    for player, hint in zip(bed.players, ("Be quick.", "Take care."), strict=True):
        (history,) = player.seen
        assert [step.shown for step in history.steps] == ["0", "1"] and history.steps[-1].hint == hint
    for way in ways:
        assert sorted(path.name for path in (way.folder / "results").iterdir()) == sorted(
            path.name for path in (bed.folder / "results").iterdir()
        ), "what was too long for the prompt can be recalled"


def test_what_is_shared_is_that_of_a_ways_first_prompt(bed: Bed) -> None:
    with_history(bed)
    bed.plays = lambda _, history: "more" if len(history.steps) < 4 else None
    (way,) = bed.ways("Go on.")
    assert (way.prompt_tokens, way.shared_tokens) == (102, 62), "of the first prompt, not of the history's"
    assert (way.hint, way.ended["answer"], way.steps) == ("Go on.", "", 4), "the fourth is a repeat"
    assert len(list((way.folder / "results").iterdir())) == 4 > len(list((bed.folder / "results").iterdir()))


def test_a_way_that_was_never_asked_shares_nothing(bed: Bed) -> None:
    bed.budget = Budget(steps=0)
    (way,) = bed.ways("Go on.")
    assert (way.prompt_tokens, way.shared_tokens, way.ended["reason"]) == (0, 0, "steps")


def test_the_log_has_a_line_for_each_way_and_what_came_of_it(bed: Bed) -> None:
    bed.plays = does(one=[writes("a", "1")], two=[writes("a", "2")])
    ways = bed.ways("one", "two", check=lambda copy: copy.read("a") == b"2")
    lines = [record for record in read_log(bed.folder) if record["kind"] == "way"]
    assert [(line["hint"], line["is_right"]) for line in lines] == [("one", False), ("two", True)]
    for line in lines:
        (way,) = (way for way in ways if way.hint == line["hint"])
        assert line["folder"] == way.folder.name and line["head"] == read_log(way.folder)[-1]["digest"]
        assert line["worked_s"] == way.ended["worked_s"]


def test_a_way_that_a_kill_left_is_begun_anew(bed: Bed) -> None:
    with_history(bed)
    before = [record["kind"] for record in read_log(bed.folder)]

    def dies(root: Path, history: RunHistory) -> str:
        (root / "rubbish").write_text("half done")
        if len(history.steps) == 3:
            raise KeyboardInterrupt
        return "third"

    bed.plays = dies
    with pytest.raises(KeyboardInterrupt):
        bed.ways("one", "two")
    bed.plays = lambda _, __: None
    bed.starts.clear()
    ways = bed.ways("one", "two")
    assert [kinds for kinds, _, _ in bed.starts] == [before] * 2
    assert [len(list((way.folder / "results").iterdir())) for way in ways] == [2, 2]
    assert not [way for way in ways if (way.folder / "workspace" / "rubbish").exists()]


def test_later_ways_leave_earlier_ones_as_they_are(bed: Bed) -> None:
    bed.plays = does(one=[writes("a", "1")], two=[writes("a", "2")])
    first = bed.ways("one", "two")
    second = bed.ways("one", "two")
    assert len({way.folder for way in [*first, *second]}) == 4
    assert (first[0].folder / "workspace" / "a").read_text() == "1"


def test_a_check_sees_what_a_way_has_left(bed: Bed) -> None:
    (bed.root / "a").write_text("one")
    libraries = [lambda root: (root / "node_modules").mkdir(), writes("node_modules/x", "x")]
    bed.plays = does(left=[writes("a", "left"), writes("sub", "x"), *libraries], right=[writes("a", "right")])
    seen: list[dict[str, str]] = []

    def check(copy: Workspace) -> bool:
        seen.append(copy.files())
        assert copy.root.is_relative_to(bed.folder), "it stays in the run's folder"
        assert (copy.root / "node_modules" / "x").is_file() == (copy.read("a") == b"left")
        return copy.read("a") == b"right"

    ways = bed.ways("left", "right", check=check)
    assert [(way.hint, way.is_right) for way in ways] == [("right", True), ("left", False)]
    x, left, right = digest_of(b"x"), digest_of(b"left"), digest_of(b"right")
    assert seen == [{"a": left, "sub": x}, {"a": right}], "what it left, and nothing else"


def test_what_a_check_does_is_none_of_the_ways_work(bed: Bed) -> None:
    """A test writes caches and reports, and may remove what it likes."""
    (bed.root / "a").write_text("one")
    (bed.root / "b").write_text("b")

    def check(copy: Workspace) -> bool:
        (copy.root / "report").write_text("all well")
        (copy.root / "a").unlink()
        (copy.root / "b").write_text("changed")
        return True

    bed.plays = does(it=[writes("a", "two")])
    (way,) = bed.ways("it", check=check)
    copied = way.folder / "workspace"
    assert {path.name: path.read_text() for path in copied.iterdir()} == {"a": "two", "b": "b"}
    assert bed.keep(way) == 0 and bed.texts() == {"a": "two", "b": "b"}
    assert sorted(path.name for path in way.folder.iterdir()) == ["head", "log.jsonl", "results", "workspace"]


def test_a_check_comes_when_the_way_is_over(bed: Bed) -> None:
    bed.plays = does(it=[writes("a", "1"), writes("a", "2")])
    seen: list[str] = []

    def check(copy: Workspace) -> bool:
        (folder,) = bed.folder.glob("way*")
        seen.extend(record["kind"] for record in read_log(folder)[-1:])
        return copy.read("a") == b"2"

    assert bed.ways("it", check=check)[0].is_right and seen == ["end"]


def test_a_check_that_fails_leaves_nothing_behind(bed: Bed) -> None:
    def check(_: Workspace) -> bool:
        raise RequestError("there is no network")

    with pytest.raises(RequestError, match="no network"):
        bed.ways("it", check=check)
    (folder,) = bed.folder.glob("way*")
    assert sorted(path.name for path in folder.iterdir()) == ["head", "log.jsonl", "workspace"]
    assert read_log(bed.folder)[-1]["kind"] == "begin"


def test_links_stay_links_where_it_is_checked(bed: Bed) -> None:
    (bed.root / "link").symlink_to("../secret")
    (bed.root / "away").symlink_to("nowhere")
    assert bed.ways("it", check=lambda copy: os.readlink(copy.root / "link") == "../secret")[0].is_right


STEPS = {"long": 3, "short": 1, "none": 0}


def test_the_best_is_right_then_finished_then_short(bed: Bed) -> None:
    bed.plays = does(
        **{name: [writes(f"{name}{n}", "x") for n in range(count)] for name, count in STEPS.items()}
    )

    def check(copy: Workspace) -> bool:
        return "short0" not in copy.files()

    assert [way.hint for way in bed.ways("long", "short", "none", check=check)] == ["none", "long", "short"]
    assert [way.hint for way in bed.ways("long", "short", "none")] == ["none", "short", "long"]
    bed.budget = Budget(steps=3)
    assert [way.hint for way in bed.ways("long", "short")] == ["short", "long"]


def test_who_has_not_finished_comes_behind_who_has(bed: Bed) -> None:
    """The one that says the same again is stopped after two steps; the other one takes three."""
    long = does(long=[writes("a", "x")] * 3, cut=[])
    bed.plays = lambda root, history: "again" if "cut" in history.task else long(root, history)
    for hints in (("cut", "long"), ("long", "cut")):
        finished, cut = bed.ways(*hints)
        assert (finished.hint, finished.steps, cut.hint, cut.steps) == ("long", 3, "cut", 2)
        assert cut.ended["reason"] == "repeated"
        finished, cut = bed.ways(*hints, check=lambda _: False)
        assert finished.hint == "long", "nor is it better where both are wrong"
        right, _ = bed.ways(*hints, check=lambda copy: "a" not in copy.files())
        assert right.hint == "cut", "right is right, though it was stopped"


def test_of_equal_ways_the_one_named_first_is_the_best(bed: Bed) -> None:
    bed.plays = does(b=[writes("x", "1")], a=[writes("x", "2")], c=[writes("x", "3")])
    assert [way.hint for way in bed.ways("b", "a", "c")] == ["b", "a", "c"]
    assert bed.ways() == []
    assert [way.hint for way in bed.ways("a", "a")] == ["a", "a"], "chance may make them differ"


def made(bed: Bed) -> Way:
    """A way that changed a, made sub/new, removed gone, and left same."""
    for name in ("a", "gone", "same"):
        (bed.root / name).write_text("one")

    def work(root: Path) -> None:
        (root / "a").write_text("two")
        (root / "gone").unlink()
        (root / "sub").mkdir()
        (root / "sub" / "new").write_text("new")

    bed.plays = does(it=[work])
    return bed.ways("it")[0]


def test_what_the_best_has_changed_is_done_in_the_workspace(bed: Bed) -> None:
    way, asked = made(bed), list[Prepared]()

    def approve(change: Prepared) -> str:
        assert bed.texts()["a"] == "one" or change.what != f"take a of {way.folder.name}", (
            "nothing is done yet"
        )
        asked.append(change)
        return ""

    assert bed.keep(way, approve) == 0
    assert bed.texts() == {"a": "two", "same": "one", "sub/new": "new"}
    one, two, new = (digest_of(text) for text in (b"one", b"two", b"new"))
    expected = [("a", one, two), ("gone", one, ""), ("sub/new", "", new)]
    of = f" of {way.folder.name}"
    assert [(one.what, one.before, one.after) for one in asked] == [
        (f"take {path}{of}", before, after) for path, before, after in expected
    ]
    lines = read_log(bed.folder)[2:]
    assert [line["kind"] for line in lines] == ["take", "taken"] * 3, "behind the way, and nothing else"
    for (path, before, after), take, taken in zip(expected, lines[::2], lines[1::2], strict=True):
        for line in (take, taken):
            assert (line["what"], line["before"], line["after"]) == (f"take {path}{of}", before, after)
        assert take["refused"] == "" and take["worked_s"] == way.ended["worked_s"]


def test_what_is_refused_is_not_taken_and_counted(bed: Bed) -> None:
    way = made(bed)
    assert bed.keep(way, lambda change: "why?" if "a of" in change.what or "new" in change.what else "") == 2
    assert bed.texts() == {"a": "one", "same": "one"}
    lines = [record for record in read_log(bed.folder) if record["kind"].startswith("take")]
    assert [(line["kind"], line.get("refused")) for line in lines] == [
        ("take", "why?"),
        ("take", ""),
        ("taken", None),
        ("take", "why?"),
    ]


def test_it_is_noted_before_it_is_done(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    way = made(bed)

    def fails(*_: object) -> None:
        assert read_log(bed.folder)[-1]["kind"] == "take"
        raise KeyboardInterrupt

    monkeypatch.setattr(Workspace, "write", fails)
    with pytest.raises(KeyboardInterrupt):
        bed.keep(way)
    assert read_log(bed.folder)[-1]["kind"] == "take", "and there is no receipt of what was not done"


@pytest.mark.parametrize("name", ["a", "gone"])
def test_what_somebody_changed_meanwhile_is_not_taken(bed: Bed, name: str) -> None:
    way = made(bed)

    def meanwhile(change: Prepared) -> str:
        if f"take {name} " in change.what:
            (bed.root / name).write_text("theirs")
        return ""

    with pytest.raises(RequestError, match=f"{name} was changed meanwhile"):
        bed.keep(way, meanwhile)
    assert bed.texts()[name] == "theirs" and read_log(bed.folder)[-1]["kind"] == "take"


def test_what_is_taken_is_what_was_shown(bed: Bed) -> None:
    """A process that a way left behind may still write in its copy."""
    way = made(bed)

    def meanwhile(change: Prepared) -> str:
        for name in ("a", "sub/new"):
            (way.folder / "workspace" / name).write_text("swapped")
        return ""

    assert bed.keep(way, meanwhile) == 0 and bed.texts() == {"a": "two", "same": "one", "sub/new": "new"}


def test_a_way_that_changed_nothing_asks_for_nothing(bed: Bed) -> None:
    (bed.root / "a").write_text("one")
    bed.plays = does(it=[writes("a", "two"), writes("a", "one")])
    (way,) = bed.ways("it")
    assert bed.keep(way, lambda _: "no") == 0 and read_log(bed.folder)[-1]["kind"] == "way"


def test_what_both_have_changed_alike_is_no_change(bed: Bed) -> None:
    way = made(bed)
    (bed.root / "a").write_text("two")
    asked: list[str] = []
    bed.keep(way, lambda change: asked.append(change.what) or "")  # type: ignore[func-returns-value]
    assert [what.split()[1] for what in asked] == ["gone", "sub/new"]


def test_bytes_are_taken_as_they_are(bed: Bed) -> None:
    data = bytes(range(256)) * 3
    bed.plays = does(it=[lambda root: (root / "b").write_bytes(data), lambda root: (root / "empty").touch()])
    (way,) = bed.ways("it")
    assert bed.keep(way) == 0
    assert (bed.root / "b").read_bytes() == data and (bed.root / "empty").read_bytes() == b""
