"""Chapter 3.9: three policies by what they say, and by two tests, one held out. Prints tables; --svg draws.

python book/experiments/agent_outcomes.py [--mistakes] [--svg book/docs/img/agent_outcomes.svg]
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path

from by_mistakes import show, told_with

from tiny_llm.agent.action import Actions, AgentTool, Arguments, Outcome, Prepared
from tiny_llm.agent.calculator import calculate
from tiny_llm.agent.files import file_tools
from tiny_llm.agent.fork import Way, keep, try_ways
from tiny_llm.agent.history import Proposal, RunHistory, turns
from tiny_llm.agent.loop import Agent, Budget, begin
from tiny_llm.agent.receipts import Log
from tiny_llm.agent.workspace import Workspace
from tiny_llm.errors import TinyLLMError
from tiny_llm.kv.blocks import BlockManager

SHOWN = (
    "quickest-first",
    "judged-where-it-works",
    "says-it-is-done",
    "one-folder-for-all",
    "taken-unasked",
)
TASKS = 20
POLICIES = ("quick", "careful", "by heart")
SEEN, HELD_OUT = (2,), (0, 1, 3, 7)  # inputs of the test that lies in the workspace, and of the other one
TRIES = 6


class _Nothing(Arguments):
    pass


@dataclass(frozen=True)
class Task:
    """A formula to be found: ``right``, and what a model guesses, one after the other."""

    right: str
    guesses: Sequence[str]

    @property
    def seen(self) -> str:
        """The test that everybody sees: inputs, and what is to come out."""
        return "\n".join(f"{x} {value(self.right, x)}" for x in SEEN)


def value(formula: str, x: int) -> str:
    """What a formula is at ``x``; "?" for none."""
    try:
        return calculate(formula.replace("x", f"({x})"))
    except TinyLLMError:
        return "?"


def made_up(number: int) -> Task:
    """A line through whole numbers; of the guesses some are right, some are so at the visible input only."""
    chance = random.Random(number)
    a, b = chance.randint(2, 9), chance.randint(1, 9)
    right = f"{a} * x + {b}"
    others = [f"{a + 1} * x + {b - SEEN[0]}", f"{a} * x - {b}", f"{a + 2} * x + {b}"]
    guesses = [chance.choices([right, *others], [4, 2, 2, 2])[0] for _ in range(TRIES)]
    return Task(right, guesses)


class Player:
    """A model by a policy, which the user's hint names. ``blocks`` is the prefix cache of its engine."""

    room = 10**6

    def __init__(self, task: Task, blocks: BlockManager) -> None:
        self._task, self._blocks = task, blocks

    def size(self, history: RunHistory) -> int:
        """There is room."""
        return 1

    def propose(self, history: RunHistory, seconds: float) -> Proposal:
        """The policy's next action, and what the prompt costs: a byte is a token."""
        prompt = list(json.dumps(turns(history)).encode())
        table = self._blocks.table()
        known = self._blocks.allocate(table, prompt) or 0
        self._blocks.register(table, prompt, len(prompt))
        self._blocks.free(table, prompt, len(prompt))
        action = self._action(history)
        return Proposal(action, "" if action else "It is done.", "", len(prompt), 20, known)

    def _action(self, history: RunHistory) -> dict[str, object] | None:
        done = [step.action for step in history.steps if step.action]
        if len(done) < 2:  # what all ways share: a look at the formula and at the test
            return action("read", path=("f", "test")[len(done)], first=1, last=9)
        policy = next((one for one in POLICIES if any(f"Be {one}." in s.hint for s in history.steps)), "")
        edits = [one["arguments"] for one in done if one["name"] == "edit"]
        if policy == "by heart":
            _, result = self._task.seen.split("\n")[0].split()
            return None if edits else action("edit", path="f", old="x", new=f"0 * x + {result}")
        tried = [step.shown for step in history.steps if step.action and step.action["name"] == "try"]
        enough = bool(edits) if policy == "quick" else bool(tried and tried[-1] == "passed")
        if enough or len(edits) == TRIES:
            return None
        if policy == "careful" and len(tried) < len(edits):
            return action("try")
        old = edits[-1]["new"] if edits else "x"
        for guess in self._task.guesses[len(edits) :]:
            if guess not in [one["new"] for one in edits]:  # nothing is tried twice
                return action("edit", path="f", old=old, new=guess)
        return None


def action(name: str, **arguments: object) -> dict[str, object]:
    """An action as a model says it."""
    return {"name": name, "arguments": arguments}


def passes(workspace: Workspace, task: Task, inputs: Sequence[int]) -> bool:
    """Whether the formula in the workspace is right at all of these."""
    formula = workspace.read("f").decode()
    return all(value(formula, x) == value(task.right, x) for x in inputs)


def tries(workspace: Workspace, task: Task) -> AgentTool:
    """The action that runs the test which everybody sees."""

    def prepare(_: object) -> Prepared:
        def perform() -> Outcome:
            return Outcome(
                "passed" if passes(workspace, task, SEEN) else f"failed, now it is {workspace.digest('f')}"
            )

        return Prepared("try", perform, "", workspace.digest("f"))

    return AgentTool.of("try", "Run the test.", _Nothing, prepare)


class Bench:
    """A task in a folder: the history that all ways share, and the ways."""

    def __init__(self, folder: Path, task: Task) -> None:
        self.task, self.root, self.folder = task, folder / "work", folder / "run"
        self.blocks = BlockManager(16, 4000)
        self.root.mkdir()
        (self.root / "f").write_text("x")
        (self.root / "test").write_text(task.seen)
        with Workspace(self.root) as workspace, Log(self.folder) as log:
            begin(
                log, "Find the formula f that passes the test. " + "It is a line through whole numbers. " * 8
            )
            self.agent(log, workspace, Budget(steps=2)).run()

    def agent(self, log: Log, workspace: Workspace, budget: Budget | None = None) -> Agent:
        """Who works in a workspace; the user allows all."""
        actions = Actions([*file_tools(workspace), tries(workspace, self.task)])
        player = Player(self.task, self.blocks)
        return Agent(log, actions, player, budget or Budget(), lambda _: "", lambda _: None)

    def ways(self, policies: Sequence[str], litter: bool = False) -> list[Way]:
        """Each policy is a way; what decides is the test that nobody has seen."""

        def check(copy: Workspace) -> bool:
            if litter:
                (copy.root / "report").write_text("written by the check")
            return passes(copy, self.task, HELD_OUT)

        with Workspace(self.root) as workspace, Log(self.folder) as log:
            return try_ways(log, workspace, [f"Be {one}." for one in policies], self.agent, check)


@dataclass(frozen=True)
class Row:
    """What a policy made of a task."""

    says_done: bool
    seen: bool
    held_out: bool
    steps: int
    prompt: int
    shared: int


def outcomes() -> Iterator[dict[str, Row]]:
    """For each task what each policy made of it."""
    for number in range(TASKS):
        with tempfile.TemporaryDirectory() as place:
            task = made_up(number)
            ways = Bench(Path(place), task).ways(POLICIES)
            found = {}
            for way in ways:
                with Workspace(way.folder / "workspace") as copy:
                    seen = passes(copy, task, SEEN)
                counts = way.steps - 2, way.prompt_tokens, way.shared_tokens
                done = way.ended["reason"] == "finished"
                found[way.hint[3:-1]] = Row(done, seen, way.is_right, *counts)
            yield found


def by_chance(better: int, worse: int) -> float:
    """How often a coin does so well or so badly: the exact sign test of tasks on which two differ."""
    number, most = better + worse, max(better, worse)
    return min(1.0, 2 * sum(comb(number, k) for k in range(most, number + 1)) / 2**number)


def table() -> str:
    """Each policy over all tasks, and two of them against each other."""
    found = list(outcomes())
    lines = ["policy     says done   passes the test   passes the other   steps   first prompt   shared"]
    for policy in POLICIES:
        rows = [one[policy] for one in found]
        done, seen, right = (
            sum(getattr(row, name) for row in rows) for name in ("says_done", "seen", "held_out")
        )
        steps, prompt, shared = (
            sum(getattr(row, name) for row in rows) / TASKS for name in ("steps", "prompt", "shared")
        )
        counts = f"{done:>11} {seen:>17} {right:>18} {steps:>7.1f}"
        lines.append(f"{policy:<9}{counts} {prompt:>14.0f} {shared:>8.0f}")
    pairs = [(one["careful"].held_out, one["quick"].held_out) for one in found]
    better, worse = pairs.count((True, False)), pairs.count((False, True))
    lines += [
        "",
        f"careful alone: {better}, quick alone: {worse}; a coin does that in {by_chance(better, worse):.1%}",
    ]
    return "\n".join(lines)


def story() -> str:
    """One task in three ways, the best of which is taken; in a line what came of it."""
    with tempfile.TemporaryDirectory() as place:
        bench, asked = Bench(Path(place), made_up(12)), list[str]()

        def approve(change: Prepared) -> str:
            asked.append(change.what)
            return ""

        try:
            best, *others = bench.ways(("by heart", "careful", "quick"), litter=True)
            with Workspace(bench.root) as workspace, Log(bench.folder) as log:
                keep(best, log, workspace, approve)
                right, files = passes(workspace, bench.task, HELD_OUT), sorted(workspace.files())
        except (TinyLLMError, OSError, AssertionError, KeyError) as error:
            return f"  {type(error).__name__}: {error}".partition(place)[0][:60]
        shared = sum(way.shared_tokens for way in (best, *others))
        whole = sum(way.prompt_tokens for way in (best, *others))
        kept = f"{best.hint[3:-1]:>9} {'yes' if right else 'no':>6} {' '.join(files):>14}"
        return f"{kept} {len(asked):>6} {shared / whole:>7.0%}"


def mistakes() -> str:
    """The story with mistakes of this chapter, each in a process of its own."""
    lines = [f"{'mistake':<22} {'kept':>9} {'right':>6} {'files':>14} {'asked':>6} {'shared':>7}"]
    lines += [f"{name:<22} {told}" for name, told in told_with(__file__, "3.9", SHOWN)]
    return "\n".join(lines)


def picture() -> str:
    """The blocks of a history, its three ways with a box a step, and what each came to."""
    with tempfile.TemporaryDirectory() as place:
        task = made_up(12)
        ways = {way.hint[3:-1]: way for way in Bench(Path(place), task).ways(POLICIES)}
        seen = {}
        for name, way in ways.items():
            with Workspace(way.folder / "workspace") as copy:
                seen[name] = passes(copy, task, SEEN)
    parts = [
        f'<text x="{left}" y="24">{text}</text>'
        for left, text in (
            (20, "what all ways share"),
            (330, "each alone"),
            (520, "test"),
            (610, "other test"),
        )
    ]
    least = min(way.shared_tokens for way in ways.values())
    blocks = least // 16
    for number in range(blocks):
        left, top = 20 + 18 * (number % 14), 50 + 18 * (number // 14)
        parts.append(f'<rect class="shared" x="{left}" y="{top}" width="14" height="14"/>')
    for row, (name, way) in enumerate((name, ways[name]) for name in POLICIES):
        top = 60 + 66 * row
        parts.append(f'<path d="M280 110C304 110 304 {top + 10} 324 {top + 10}"/>')
        for number in range(way.steps - 2):
            parts.append(f'<rect class="own" x="{330 + 18 * number}" y="{top}" width="14" height="20"/>')
        parts.append(f'<text x="330" y="{top + 38}">{name}</text>')
        for left, passed in ((520, seen[name]), (610, way.is_right)):
            kind, text = ("yes", "passes") if passed else ("no", "fails")
            parts.append(f'<rect class="{kind}" x="{left}" y="{top}" width="74" height="26" rx="4"/>')
            parts.append(f'<text x="{left + 37}" y="{top + 18}" text-anchor="middle">{text}</text>')
    style = (
        "svg{background:#fff}text{font:13px monospace;fill:#333}path{stroke:#555;fill:none}"
        ".shared{fill:#a9c8e6}.own{fill:#f3c795}.yes{fill:#cfe3c8}.no{fill:#f3b27a}"
    )
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 260">'
    return "\n".join([f"{head}<style>{style}</style>", *parts, "</svg>\n"])


if __name__ == "__main__":
    os.fsync = lambda _: None  # no power is cut here
    show(__doc__, table, picture, mistakes, story)
