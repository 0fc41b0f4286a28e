"""Chapter 3.8: a run is killed at each moment, and another process goes on. Prints tables; --svg draws.

python book/experiments/agent_effects.py [--mistakes] [--svg book/docs/img/agent_effects.svg]
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from by_mistakes import show, told_with

from tiny_llm.agent.action import Actions, AgentTool, Arguments, Outcome, Prepared
from tiny_llm.agent.files import file_tools
from tiny_llm.agent.history import Proposal, RunHistory
from tiny_llm.agent.loop import Agent, Budget, begin
from tiny_llm.agent.receipts import Log
from tiny_llm.agent.workspace import Workspace, digest_of
from tiny_llm.errors import TinyLLMError

SHOWN = (
    "done-then-noted",
    "once-more-to-be-sure",
    "same-digest-not-done",
    "written-in-place",
    "head-first",
    "only-the-last-head",
)
WORDS = {
    "propose": "the model is asked",
    "before action": "it has proposed",
    "action": "the action is noted",
    "asked": "the user is asked",
    "before intent": "the user has allowed it",
    "intent": "the intent is noted",
    "half": "the new file is written beside the old one",
    "swap": "it is about to take its place",
    "swapped": "it has taken its place",
    "before receipt": "the edit is done",
    "receipt": "the receipt is noted",
    "end": "the answer is noted",
}


class _Push(Arguments):
    pass


@dataclass
class Moments:
    """What happens in a process, by name; at one of them it ends, as by kill -9."""

    dies_at: int = -1
    names: list[str] = field(default_factory=list)

    def now(self, name: str) -> None:
        """A moment: nothing is tidied up if it is the last."""
        self.names.append(name)
        if len(self.names) - 1 == self.dies_at:
            os._exit(9)


class Process:
    """A process that works on the run in ``folder``: an edit of the file a and, with ``push``, a command."""

    def __init__(self, folder: Path, moments: Moments, push: bool) -> None:
        self.folder, self.moments, self.push = folder, moments, push
        self.asked = self.proposed = 0
        self.room = 10_000

    def size(self, history: RunHistory) -> int:
        """There is room."""
        return 1

    def propose(self, history: RunHistory, seconds: float) -> Proposal:
        """What is not done yet, by the world as it is."""
        self.proposed += 1
        self.moments.now("propose")
        if (self.folder / "work" / "a").read_text() != "two":
            old = (self.folder / "work" / "a").read_text()
            return Proposal({"name": "edit", "arguments": {"path": "a", "old": old, "new": "two"}}, "")
        if self.push and not (self.folder / "count").read_text():
            return Proposal({"name": "push", "arguments": {}}, "")
        return Proposal(None, "done")

    def approve(self, prepared: Prepared) -> str:
        """The user allows all."""
        self.asked += 1
        self.moments.now("asked")
        return ""

    def pushes(self) -> AgentTool:
        """A command that does something outside, once each time."""
        count = self.folder / "count"

        def perform() -> Outcome:
            self.moments.now("before push")
            with count.open("a") as file:
                file.write("x")
            self.moments.now("pushed")
            return Outcome("pushed", 0, digest())

        def digest(_: Any = None) -> str:
            return digest_of(b"the workspace, which it leaves as it is")

        def prepare(_: Any) -> Prepared:
            return Prepared("push", perform, "", digest())

        return AgentTool.of("push", "", _Push, prepare, has_effect=True, digest=digest)

    def run(self) -> Agent:
        """Begin, or go on, to the end."""
        with Workspace(self.folder / "work") as workspace, Log(self.folder / "run") as log:
            if not log.records:
                begin(log, "do it")
            actions = Actions([*file_tools(workspace), self.pushes()])
            agent = Agent(log, actions, self, Budget(), self.approve, lambda _: None)
            agent.run()
        return agent


def watched(moments: Moments) -> Callable[[], None]:
    """Have all that matters be a moment; what undoes it. No power is cut: fsync does nothing."""
    sync, replace, append, write = os.fsync, os.replace, Log.append, Workspace.write
    stage: list[str] = []

    def syncs(_: int) -> None:
        moments.now("swapped" if stage[-1] == "swapped" else stage[-1])

    def replaces(*names: Any, **folders: Any) -> None:
        if stage[-1] != "half":
            replace(*names, **folders)
            moments.now(f"head of {stage[-1]}")
            return
        moments.now("swap")
        replace(*names, **folders)
        stage[-1] = "swapped"

    def appends(log: Log, kind: str, **said: Any) -> Any:
        moments.now(f"before {kind}")
        stage.append(kind)
        record = append(log, kind, **said)
        moments.now(stage.pop())
        return record

    def writes(workspace: Workspace, path: str, data: bytes, before: str) -> None:
        stage.append("half")
        write(workspace, path, data, before)
        stage.pop()

    Log.append, Workspace.write = appends, writes  # type: ignore[assignment, method-assign]
    os.fsync, os.replace = syncs, replaces  # type: ignore[assignment]

    def undo() -> None:
        Log.append, Workspace.write = append, write  # type: ignore[method-assign]
        os.fsync, os.replace = sync, replace

    return undo


@dataclass(frozen=True)
class Ended:
    """A kill at a moment, and what came of it: the file right after it, and the other process."""

    moment: str
    left: str
    done_by_then: bool
    pushes: int
    proposed: int
    asked: int
    told: str
    proved: bool
    broken: bool


def killed(push: bool) -> Iterator[Ended]:
    """A run is killed at each of its moments."""
    names = moments_of(push)
    for number, name in enumerate(names):
        with tempfile.TemporaryDirectory() as place:
            folder = made(Path(place))
            if (child := os.fork()) == 0:
                moments = Moments(number)
                watched(moments)
                Process(folder, moments, push).run()
                os._exit(0)
            os.waitpid(child, 0)
            left = (folder / "work" / "a").read_text()
            pushed = bool((folder / "count").read_text())
            undo, other = watched(Moments()), Process(folder, Moments(), push)
            receipts: Sequence[Any] = ()
            broken = False
            try:
                other.run()
                with Log(folder / "run") as log:
                    receipts = [one for one in log.records if one["kind"] == "receipt"]
            except (TinyLLMError, AssertionError, KeyError):
                broken = True
            finally:
                undo()
            seen: Any = next((one for one in receipts if one.get("recovered")), {"what": "", "shown": ""})
            done = pushed if seen["what"] == "push" else left == "two"
            proved = any(one["after"] == digest_of(b"two") != one["before"] for one in receipts)
            pushes = len((folder / "count").read_text())
            told = seen["shown"].partition("this: ")[2].rstrip(".")
            yield Ended(name, left, done, pushes, other.proposed, other.asked, told, proved, broken)


def made(folder: Path) -> Path:
    """A place for a run: a workspace with the file a, and the count of pushes beside it."""
    (folder / "work").mkdir()
    (folder / "work" / "a").write_text("one")
    (folder / "count").write_text("")
    return folder


def moments_of(push: bool) -> list[str]:
    """Those of a run that nobody kills, but for those before its beginning."""
    moments = Moments()
    undo = watched(moments)
    try:
        with tempfile.TemporaryDirectory() as place:
            Process(made(Path(place)), moments, push).run()
    finally:
        undo()
    return moments.names


def rows() -> dict[str, Ended]:
    """For each moment of an edit what comes of a kill at it; of several of a name, the first."""
    found: dict[str, Ended] = {}
    for one in killed(push=False):
        found.setdefault(one.moment, one)
    return {moment: found[moment] for moment in WORDS}


def table() -> str:
    """What the next process does, by the moment of the kill."""
    lines = [f"{'killed when':<43} model  user   the model is told"]
    for moment, one in rows().items():
        asked = f"{one.proposed:>5} {one.asked:>5}"
        lines.append(f"{WORDS[moment]:<43} {asked}   {one.told or '-'}")
    return "\n".join(lines)


def story() -> str:
    """An edit and a command, killed at each moment; in a line what went wrong."""
    try:
        ends = list(killed(push=True))
    except (TinyLLMError, AssertionError, KeyError, OSError) as error:
        return f"{type(error).__name__}: {error}"[:60]
    wrong = sum(
        one.told in ("it was done", "it was not done") and (one.told == "it was done") != one.done_by_then
        for one in ends
    )
    count = Counter[str]()
    for one in ends:
        count["twice"] += one.pushes > 1
        count["half"] += one.left not in ("one", "two")
        count["unproved"] += not one.proved and not one.broken
        count["broken"] += one.broken
    shown = f"{count['twice']:>7}{wrong:>9}{count['half']:>7}{count['unproved']:>12}{count['broken']:>9}"
    return f"{len(ends):>5}{shown}"


def mistakes() -> str:
    """The story with mistakes of this chapter, each in a process of its own."""
    lines = [f"{'mistake':<21} kills  twice  mistold   half  no receipt   broken"]
    lines += [f"{name:<21} {told}" for name, told in told_with(__file__, "3.8", SHOWN)]
    return "\n".join(lines)


def picture() -> str:
    """The moments of an edit from top to bottom, and beside each what the next process does."""
    parts = [
        '<text class="h" x="30" y="22">killed when ...</text>',
        '<text class="h" x="410" y="22">... the next process</text>',
    ]
    whole = rows()
    for row, (moment, one) in enumerate(whole.items()):
        top = 36 + 30 * row
        does = "goes on"
        if one.told:
            does = f"tells the model: {one.told}"
        elif one.asked:
            does = "asks the user" if one.proposed == 1 else "asks the model, then the user"
        kind = "seen" if one.told else "again" if one.asked else "on"
        parts.append(f'<rect class="{kind}" x="20" y="{top}" width="360" height="26" rx="4"/>')
        parts.append(f'<text x="32" y="{top + 18}">{WORDS[moment]}</text>')
        parts.append(f'<path d="M386 {top + 13}h12m-5 -4l5 4l-5 4"/>')
        parts.append(f'<text x="410" y="{top + 18}">{does}</text>')
    style = (
        "svg{background:#fff}text{font:13px monospace;fill:#333}.h{fill:#777}path{stroke:#555;fill:none}"
        ".again{fill:#cfdcea}.seen{fill:#f3b27a}.on{fill:#cfe3c8}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {44 + 30 * len(whole)}">'
    return "\n".join([f"{head}<style>{style}</style>", *parts, "</svg>\n"])


if __name__ == "__main__":
    show(__doc__, table, picture, mistakes, story)
