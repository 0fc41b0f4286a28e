"""Two ways from one history: the better by its outcome is kept, with receipts; the blocks are shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny_llm.agent.action import Actions
from tiny_llm.agent.calculator import calculator
from tiny_llm.agent.fork import keep, try_ways
from tiny_llm.agent.loop import Agent, Budget, begin
from tiny_llm.agent.model import EngineModel
from tiny_llm.agent.receipts import Log, read_log
from tiny_llm.agent.workspace import Workspace
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import RequestError
from tiny_llm.sampling_params import SamplingParams


def edit(path: str, old: str, new: str) -> tuple[str, dict[str, str]]:
    return "edit", {"path": path, "old": old, "new": new}


def test_the_way_whose_check_holds_is_kept(bench: Any) -> None:
    bench.write("a", "x = 1")
    bench.write("b", "kept")
    bench.write("c", "to go")

    def speaks(history: Any) -> Any:
        """Told "two" it is right, in more steps than the other way takes."""
        if "two" not in history.task:
            return [edit("a", "1", "3"), "done"][len(history.steps)]
        return [edit("new/d", "", "new"), edit("a", "1", "2"), "done"][len(history.steps)]

    def start(log: Log, workspace: Workspace) -> Agent:
        actions = bench.actions(workspace)
        return Agent(log, actions, bench.scripted(speaks), Budget(), lambda _: "", lambda _: None)

    def check(workspace: Workspace) -> bool:
        (workspace.root / "c").write_text("what the check leaves")
        return workspace.read("a") == b"x = 2"

    with Workspace(bench.root) as workspace, Log(bench.folder) as log:
        begin(log, "fix it", workspace=str(bench.root))
        best, other = try_ways(log, workspace, ["three", "two"], start, check)
        assert (best.hint, best.is_right, best.steps) == ("two", True, 2)
        assert (other.hint, other.is_right, other.steps) == ("three", False, 1)
        assert bench.text("a") == "x = 1", "the workspace is as it was"
        (best.folder / "workspace" / "c").unlink()  # as a command of the way would
        assert keep(best, log, workspace, lambda one: "no" if "new/d" in one.what else "") == 1
        files = workspace.files()
    assert bench.text("a") == "x = 2" and sorted(files) == ["a", "b"]
    taken = [one for one in read_log(bench.folder) if one["kind"] == "taken"]
    assert [(one["what"].split()[1], one["after"]) for one in taken] == [("a", files["a"]), ("c", "")]
    prefix = read_log(bench.folder)[0]
    assert read_log(best.folder)[0] == read_log(other.folder)[0] == prefix, (
        "one history, as long as it is one"
    )


def test_what_changed_meanwhile_is_not_overwritten_by_a_way(bench: Any) -> None:
    bench.write("a", "1")

    def start(log: Log, workspace: Workspace) -> Agent:
        model = bench.scripted([edit("a", "1", "2"), "done"])
        return Agent(log, bench.actions(workspace), model, Budget(), lambda _: "", lambda _: None)

    def meanwhile(_: object) -> str:
        bench.write("a", "theirs")
        return ""

    with Workspace(bench.root) as workspace, Log(bench.folder) as log:
        begin(log, "fix it", workspace=str(bench.root))
        (way,) = try_ways(log, workspace, [""], start, lambda _: True)
        with pytest.raises(RequestError, match="changed meanwhile"):
            keep(way, log, workspace, meanwhile)
    assert bench.text("a") == "theirs"


@pytest.mark.slow
def test_ways_share_the_blocks_of_their_history(bench: Any, llm: LLM) -> None:
    """On our engine: the second way's first prompt finds all of the history in the prefix cache."""
    actions = Actions([calculator()])
    model = EngineModel(llm, actions, SamplingParams(max_tokens=32))

    def start(log: Log, workspace: Workspace) -> Agent:
        return Agent(log, actions, model, Budget(steps=3), lambda _: "", lambda _: None)

    with Workspace(bench.root) as workspace, Log(bench.folder) as log:
        begin(log, "What is 37 * 12? " + "It matters. " * 20, workspace=str(bench.root))
        ways = try_ways(log, workspace, ["Be quick.", "Take care."], start, lambda _: True)
    second = next(way for way in ways if way.hint == "Take care.")
    history = len(llm.chat_prompt([{"role": "user", "content": "It matters. " * 20}]))
    assert history <= second.shared_tokens < second.prompt_tokens
    assert Path(second.folder).is_dir()
