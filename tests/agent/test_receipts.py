"""The log is whole, or that is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_llm.agent.receipts import HEAD, LOG, Log, read_log
from tiny_llm.agent.workspace import digest_of
from tiny_llm.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with a log of five lines."""
    with Log(tmp_path / "run") as log:
        for number in range(5):
            log.append("receipt", what=f"thing {number}", exit=number)
    return tmp_path / "run"


def lines_of(folder: Path) -> list[str]:
    return (folder / LOG).read_text().splitlines(keepends=True)


def test_a_log_goes_on_where_it_was(folder: Path) -> None:
    with Log(folder) as log:
        assert [record["what"] for record in log.records] == [f"thing {number}" for number in range(5)]
        log.append("end")
        assert log.head == log.records[-1]["digest"] != log.records[-2]["digest"]
    assert [record["n"] for record in read_log(folder)] == list(range(6))


def redigested(line: str, **changes: object) -> str:
    record = json.loads(line) | changes
    own = {key: value for key, value in record.items() if key != "digest"}
    record["digest"] = digest_of(json.dumps(own, sort_keys=True).encode())
    return json.dumps(record) + "\n"


EDITS: dict[str, Callable[[list[str]], list[str]]] = {
    "a value": lambda lines: [lines[0].replace('"exit": 0', '"exit": 9'), *lines[1:]],
    "a value and its digest": lambda lines: [lines[0], redigested(lines[1], exit=9), *lines[2:]],
    "the last value and its digest": lambda lines: [*lines[:-1], redigested(lines[-1], exit=9)],
    "a line gone": lambda lines: [*lines[:2], *lines[3:]],
    "the first line gone": lambda lines: lines[1:],
    "the end gone": lambda lines: lines[:3],
    "all gone": lambda lines: [],
    "a line twice": lambda lines: [*lines, lines[-1]],
    "two lines changed about": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "no JSON": lambda lines: [*lines[:4], "{\n"],
    "no object": lambda lines: [*lines[:4], "7\n"],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_of_the_log_is_noticed(folder: Path, edit: Callable[[list[str]], list[str]]) -> None:
    (folder / LOG).write_text("".join(edit(lines_of(folder))))
    with pytest.raises(ConfigError, match=r"was changed, added or removed|was cut off or replaced"):
        read_log(folder)
    with pytest.raises(ConfigError):
        Log(folder)


def test_a_line_cut_short_by_a_kill_was_never_there(folder: Path) -> None:
    with (folder / LOG).open("a") as file:
        file.write('{"n": 5, "kind": "rec')
    with Log(folder) as log:
        assert len(log.records) == 5
        log.append("end")
    assert len(read_log(folder)) == 6


def test_a_kill_between_a_line_and_its_head_is_no_edit(folder: Path) -> None:
    before = (folder / HEAD).read_text()
    with Log(folder) as log:
        log.append("end")
    (folder / HEAD).write_text(before)
    assert len(read_log(folder)) == 6


def test_one_process_at_a_time(folder: Path) -> None:
    with Log(folder), pytest.raises(ConfigError, match="another process"):
        Log(folder)
