"""A workspace, a log, and a model that is a plain function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tiny_llm.agent.action import Actions, Prepared
from tiny_llm.agent.calculator import calculator
from tiny_llm.agent.command import CommandLimits, can_isolate, command_tool
from tiny_llm.agent.files import file_tools
from tiny_llm.agent.history import Proposal, RunHistory
from tiny_llm.agent.loop import Agent, Budget, begin
from tiny_llm.agent.receipts import Log, Record
from tiny_llm.agent.results import Results
from tiny_llm.agent.workspace import Workspace

Said = str | tuple[str, dict[str, Any]]
"""An answer, or a tool's name and arguments."""
Speaker = Callable[[RunHistory], Said]


class Scripted:
    """A model by a function of the history; a list says one thing after the other."""

    def __init__(self, speaks: Speaker | Sequence[Said], room: int = 8000, tokens: int = 10) -> None:
        self._speaks = speaks if callable(speaks) else lambda history: speaks[len(history.steps)]
        self.room, self._tokens = room, tokens
        self.seen: list[RunHistory] = []

    def size(self, history: RunHistory) -> int:
        steps = history.steps[history.short :]
        return (len(history.task + history.summary) + sum(len(f"{s.action}{s.shown}") for s in steps)) // 4

    def propose(self, history: RunHistory, seconds: float) -> Proposal:
        self.seen.append(history)
        said = self._speaks(history)
        if isinstance(said, str):
            return Proposal(None, said, tokens=self._tokens)
        return Proposal({"name": said[0], "arguments": said[1]}, "", tokens=self._tokens)


class Bench:
    """A workspace in ``root``, runs in ``folder``, and what was asked and noted."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.asked: list[Prepared] = []
        self.noted: list[Record] = []

    scripted = Scripted

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def text(self, name: str) -> str:
        return (self.root / name).read_text()

    def actions(self, workspace: Workspace, allow: Sequence[str] = (), **limits: Any) -> Actions:
        tools = [*file_tools(workspace), calculator(), Results(self.folder / "results").tool()]
        if allow:
            bounds = CommandLimits(**limits)
            tools.append(command_tool(workspace, allow, network=not can_isolate(), limits=bounds))
        return Actions(tools)

    def run(
        self,
        speaks: Speaker | Sequence[Said] | Scripted,
        *,
        task: str = "do it",
        budget: Budget | None = None,
        approve: Callable[[Prepared], str] = lambda _: "",
        hint: str = "",
        **bounds: Any,
    ) -> Record:
        """Begin a run, or go on with it; its end. ``self.agent`` is what ran."""

        def ask(prepared: Prepared) -> str:
            self.asked.append(prepared)
            return approve(prepared)

        model = speaks if isinstance(speaks, Scripted) else Scripted(speaks)
        with Workspace(self.root) as workspace, Log(self.folder) as log:
            if not log.records:
                begin(log, task, workspace=str(self.root))
            actions = self.actions(workspace, **bounds)
            self.agent = Agent(log, actions, model, budget or Budget(), ask, self.noted.append)
            if hint:
                self.agent.hint(hint)
            return self.agent.run()

    def receipts(self) -> list[Record]:
        return [record for record in self.noted if record["kind"] == "receipt"]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    (tmp_path / "work").mkdir()
    yield Bench(tmp_path / "work", tmp_path / "run")


@pytest.fixture
def workspace(bench: Bench) -> Iterator[Workspace]:
    with Workspace(bench.root) as one:
        yield one
