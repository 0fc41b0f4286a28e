"""The log is whole, or that is noticed; and a kill is no edit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_llm.agent.receipts import HEAD, LOG, Log, read_log
from tiny_llm.agent.workspace import digest_of
from tiny_llm.errors import ConfigError

pytestmark = pytest.mark.chapter("3.8")


@pytest.fixture(scope="session")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a log of five lines, made once."""
    folder = tmp_path_factory.mktemp("log") / "run"
    with Log(folder) as log:
        for number in range(5):
            log.append("receipt", what=f"thing {number}", exit=number)
    return folder


@pytest.fixture
def folder(five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it. No power is cut here: what a test does not look at need not get to the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return Path(shutil.copytree(five, tmp_path / "run"))


def lines_of(folder: Path) -> list[str]:
    return (folder / LOG).read_text().splitlines(keepends=True)


def test_a_record_says_what_it_is_and_what_it_follows(folder: Path) -> None:
    with Log(folder) as log:
        before = log.head
        record = log.append("end", answer="done", exit=0)
        own = {"n": 5, "kind": "end", "answer": "done", "exit": 0, "before_it": before}
        assert record == {**own, "digest": digest_of(json.dumps(own, sort_keys=True).encode())}
        assert log.records[-1] == record and log.head == record["digest"] != before
    assert json.loads(lines_of(folder)[-1]) == record and len(lines_of(folder)) == 6
    assert (folder / HEAD).read_text() == record["digest"]


def test_the_first_record_follows_nothing(folder: Path) -> None:
    with Log(folder / "new") as log:
        assert log.head == "" and log.records == []
        assert log.append("begin", task="x")["before_it"] == "" and log.records[0]["n"] == 0


def test_a_log_goes_on_where_it_was(folder: Path) -> None:
    with Log(folder) as log:
        assert [record["what"] for record in log.records] == [f"thing {number}" for number in range(5)]
        log.append("end")
        assert log.head == log.records[-1]["digest"] != log.records[-2]["digest"]
    assert [record["n"] for record in read_log(folder)] == list(range(6))


def test_a_line_is_on_the_disk_before_its_head_and_both_before_it_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, bool]] = []
    replace = os.replace

    def noted(what: str) -> None:
        last = json.loads(lines_of(folder)[-1])
        seen.append((what, len(lines_of(folder)), (folder / HEAD).read_text() == last["digest"]))

    def replaced(source: Any, target: Any, **more: Any) -> None:
        noted("head")
        replace(source, target, **more)

    monkeypatch.setattr(os, "fsync", lambda _: noted("line"))
    monkeypatch.setattr(os, "replace", replaced)
    with Log(folder) as log:
        log.append("end")
        noted("done")
    assert seen == [("line", 6, False), ("head", 6, False), ("done", 6, True)]


def redigested(line: str, **changes: object) -> str:
    record = json.loads(line) | changes
    own = {key: value for key, value in record.items() if key != "digest"}
    record["digest"] = digest_of(json.dumps(own, sort_keys=True).encode())
    return json.dumps(record) + "\n"


def chained(lines: list[str], count: int) -> list[str]:
    """So many lines more, as the log itself would have written them."""
    for _ in range(count):
        last = json.loads(lines[-1])
        lines = [*lines, redigested(lines[-1], n=last["n"] + 1, before_it=last["digest"])]
    return lines


EDITS: dict[str, Callable[[list[str]], list[str]]] = {
    "a value": lambda lines: [lines[0].replace('"exit": 0', '"exit": 9'), *lines[1:]],
    "a value and its digest": lambda lines: [lines[0], redigested(lines[1], exit=9), *lines[2:]],
    "the last value and its digest": lambda lines: [*lines[:-1], redigested(lines[-1], exit=9)],
    "a line gone": lambda lines: [*lines[:2], *lines[3:]],
    "the first line gone": lambda lines: lines[1:],
    "the last line gone": lambda lines: lines[:4],
    "the end gone": lambda lines: lines[:3],
    "all gone": lambda lines: [],
    "all but the first gone": lambda lines: lines[:1],
    "a line twice": lambda lines: [*lines, lines[-1]],
    "two lines more": lambda lines: chained(lines, 2),
    "another end": lambda lines: [*lines[:3], *chained([redigested(lines[3], exit=9)], 1)],
    "two lines changed about": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "no JSON": lambda lines: [*lines[:4], "{\n"],
    "no object": lambda lines: [*lines[:4], "7\n"],
    "an empty line": lambda lines: [*lines, "\n"],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_of_the_log_is_noticed(folder: Path, edit: Callable[[list[str]], list[str]]) -> None:
    (folder / LOG).write_text("".join(edit(lines_of(folder))))
    with pytest.raises(ConfigError, match=r"was changed, added or removed|was cut off or replaced"):
        read_log(folder)
    with pytest.raises(ConfigError):
        Log(folder)


def test_a_head_that_is_gone_or_another_is_noticed(folder: Path) -> None:
    for text in ("", "0" * 64, json.loads(lines_of(folder)[0])["digest"]):
        (folder / HEAD).write_text(text)
        with pytest.raises(ConfigError, match="cut off or replaced"):
            read_log(folder)
    (folder / HEAD).unlink()
    with pytest.raises(ConfigError, match="cut off or replaced"):
        read_log(folder)


def test_a_head_with_an_end_of_line_is_the_same(folder: Path) -> None:
    with (folder / HEAD).open("a") as file:
        file.write("\n")
    assert len(read_log(folder)) == 5, "as an editor leaves it"


def test_what_is_no_text_is_noticed(folder: Path) -> None:
    (folder / LOG).write_bytes((folder / LOG).read_bytes().replace(b"thing 2", b"thing \xff"))
    with pytest.raises(ConfigError, match="line 3"):
        read_log(folder)


def test_a_log_that_is_not_there_is_said_so(folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_log(folder / "none")


@pytest.mark.parametrize("share", [1, 0.5, 0.02])
def test_a_line_cut_short_by_a_kill_was_never_there(folder: Path, share: float) -> None:
    line = chained(lines_of(folder), 1)[-1].rstrip("\n")  # whole, but for its end, or less
    with (folder / LOG).open("a") as file:
        file.write(line[: int(len(line) * share)])
    with Log(folder) as log:
        assert len(log.records) == 5
        log.append("end")
    assert [record["kind"] for record in read_log(folder)] == ["receipt"] * 5 + ["end"]
    assert len(lines_of(folder)) == 6, "nothing is left of it"


def test_a_cut_line_is_left_to_who_writes(folder: Path) -> None:
    with (folder / LOG).open("a") as file:
        file.write('{"n": 5')
    whole = (folder / LOG).read_bytes()
    assert len(read_log(folder)) == 5 and (folder / LOG).read_bytes() == whole, "to read changes nothing"


def test_a_kill_between_a_line_and_its_head_is_no_edit(folder: Path) -> None:
    before = (folder / HEAD).read_text()
    with Log(folder) as log:
        log.append("end")
    (folder / HEAD).write_text(before)
    assert len(read_log(folder)) == 6
    with Log(folder) as log:
        log.append("more")
    assert len(read_log(folder)) == 7


def test_a_kill_at_the_very_beginning_is_no_edit(folder: Path) -> None:
    with Log(folder / "new"):
        pass
    assert read_log(folder / "new") == [], "before the first line"
    with Log(folder / "new") as log:
        log.append("begin")
    (folder / "new" / HEAD).unlink()
    assert len(read_log(folder / "new")) == 1, "before its head"
    with Log(folder / "new") as log:
        log.append("action")
    (folder / "new" / HEAD).unlink()
    with pytest.raises(ConfigError, match="cut off or replaced"):
        read_log(folder / "new")


def test_a_head_that_was_half_written_is_no_head(folder: Path) -> None:
    (folder / f"{HEAD}.half").write_text("00")
    with Log(folder) as log:
        log.append("end")
    assert len(read_log(folder)) == 6


def test_what_is_said_in_any_language_is_kept(folder: Path) -> None:
    with Log(folder) as log:
        log.append("hint", text="größer\u2028\n\x85 \ud800")
    assert read_log(folder)[-1]["text"] == "größer\u2028\n\x85 \ud800", "a line is what ends with \\n"


def test_one_process_at_a_time(folder: Path) -> None:
    with Log(folder), pytest.raises(ConfigError, match="another process"):
        Log(folder)
