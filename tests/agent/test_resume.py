"""A run that was killed goes on: each thing is done once, and what is not known is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny_llm.agent.loop import Agent, Budget
from tiny_llm.agent.receipts import LOG, read_log
from tiny_llm.agent.workspace import digest_of

ROOT = Path(__file__).resolve().parents[2]
EDIT = ("edit", {"path": "a", "old": "one", "new": "two"})
ADD = ("calculator", {"expression": "1 + 1"})

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import Bench
from tiny_llm.agent.receipts import Log

bench = Bench(Path({root!r}), Path({folder!r}))
append, write = Log.append, os.replace

def dying(log, kind, **said):
    if {at!r} == "before " + kind: os.kill(os.getpid(), signal.SIGKILL)
    record = append(log, kind, **said)
    if {at!r} == "after " + kind: os.kill(os.getpid(), signal.SIGKILL)
    return record

Log.append = dying
bench.run([{add!r}, {edit!r}, "done"])
"""


@pytest.mark.parametrize("at", ["before intent", "after intent", "before end"])
def test_a_kill_at_any_moment_and_all_is_done_once(bench: Any, at: str) -> None:
    """kill -9 of a real process, in the middle of a step; another one goes on with its log."""
    bench.write("a", "one")
    script = KILLED.format(
        tests=str(Path(__file__).parent),
        root=str(bench.root),
        folder=str(bench.folder),
        at=at,
        add=ADD,
        edit=EDIT,
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    before = len(read_log(bench.folder))
    end = bench.run([ADD, EDIT, EDIT, "done"] if at == "after intent" else [ADD, EDIT, "done"])
    assert (end["reason"], bench.text("a")) == ("finished", "two")
    records = read_log(bench.folder)
    assert len(records) > before
    edits = [one for one in records if one["kind"] == "receipt" and one["what"] == "edit a"]
    assert [one["after"] == digest_of(b"two") for one in edits].count(True) == 1
    assert [one["n"] for one in records] == list(range(len(records)))


def cut(bench: Any, kind: str, number: int = 0) -> None:
    """The log as a kill behind that record of this kind leaves it."""
    lines = (bench.folder / LOG).read_text().splitlines(keepends=True)
    places = [place for place, line in enumerate(lines) if json.loads(line)["kind"] == kind]
    kept = lines[: places[number] + 1]
    (bench.folder / LOG).write_text("".join(kept))
    (bench.folder / "head").write_text(json.loads(kept[-1])["digest"])
    bench.noted.clear()
    bench.asked.clear()


def test_an_edit_that_was_done_is_not_done_again(bench: Any) -> None:
    bench.write("a", "one")
    bench.run([EDIT, "done"])
    cut(bench, "intent")
    assert bench.run([EDIT, "done"])["reason"] == "finished"
    (receipt,) = bench.receipts()
    assert (
        "it was done" in receipt["shown"] and receipt["recovered"] and receipt["after"] == digest_of(b"two")
    )
    assert not bench.asked


def test_an_edit_that_was_not_done_is_told(bench: Any) -> None:
    bench.write("a", "one")
    bench.run([EDIT, "done"])
    cut(bench, "intent")
    bench.write("a", "one")
    bench.run([EDIT, "done"])
    (receipt,) = bench.receipts()
    assert "it was not done" in receipt["shown"] and receipt["before"] == receipt["after"]


def test_of_a_command_nobody_knows_and_that_is_said(bench: Any) -> None:
    touch = ("run", {"command": "touch b", "arguments": []})
    bench.run([touch, "done"], allow=["touch b"])
    cut(bench, "intent")
    bench.run([touch, "done"], allow=["touch b"])
    (receipt,) = bench.receipts()
    assert "may have been done" in receipt["shown"] and receipt["before"] != receipt["after"]


def test_what_was_only_proposed_is_asked_for_again(bench: Any) -> None:
    bench.write("a", "one")
    bench.run([EDIT, "done"])
    cut(bench, "action")
    bench.write("a", "one")
    bench.run([EDIT, "done"])
    assert [one.what for one in bench.asked] == ["edit a"] and bench.text("a") == "two"


def test_a_resumed_run_knows_what_the_other_knew(bench: Any) -> None:
    """Steps, tokens, time, history: all of it is in the log."""
    bench.run([("calculator", {"expression": f"{n}"}) for n in range(4)], budget=Budget(steps=4))
    first = bench.agent
    bench.run(["done"] * 5)
    second: Agent = bench.agent
    assert second.history.steps == first.history.steps
    assert (second.steps, second.tokens) == (4, first.tokens + 10)
    assert os.path.exists(bench.folder / LOG)
