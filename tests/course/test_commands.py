"""What a learner types, on chapter 1.1: from an empty folder to a chapter that is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from book.course import commands
from book.course.commands import app
from book.course.manifest import read_manifest
from book.course.workbook import Workbook
from tiny_llm.errors import ConfigError

ATTENTION, SOFTMAX = "tiny_llm.ops.attention:attention_ref", "tiny_llm.ops.softmax:softmax_ref"
FIRST = read_manifest()["1.1"]


def course(book: Workbook, *arguments: str) -> Result:
    """Run one command on the learner's folder."""
    folder = [] if arguments[0] == "break" else ["--folder", str(book.folder)]
    return CliRunner().invoke(app, [*arguments, *folder])


def state(book: Workbook) -> str:
    """The first chapter's line in the list."""
    return next(line for line in course(book, "list").output.splitlines() if line.startswith("1.1"))


def change(book: Workbook, file: str, old: str, new: str) -> None:
    """Edit a learner's file."""
    path = book.folder / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_from_nothing_to_done(book: Workbook) -> None:
    assert state(book).endswith("not begun") and " 90 " in state(book)
    assert "ops/attention.py: attention_ref" in course(book, "start", "1.1").output
    refused = course(book, "check", "1.1")
    assert isinstance(refused.exception, ConfigError)
    assert "still to be written" in str(refused.exception) and "softmax_ref" in str(refused.exception)

    for file in (book.folder / "ops").iterdir():
        file.unlink()
    book.fill([SOFTMAX])
    assert state(book).endswith("1 of 2 written")
    book.fill([ATTENTION])
    assert state(book).endswith("to be checked")
    green = course(book, "check", "1.1")
    assert green.exit_code == 0 and "Chapter 1.1 is done." in green.output, green.output
    assert state(book).endswith("done")
    change(book, "ops/attention.py", "Scores are float32", "Scores are in float32")
    assert state(book).endswith("changed since checked")


def test_one_task_is_checked_before_the_others_are_written(book: Workbook) -> None:
    book.fill([SOFTMAX])
    book.start(FIRST)
    refused = course(book, "check", "1.1", "attention_ref").exception
    assert "still to be written" in str(refused) and "softmax_ref" not in str(refused)
    green = course(book, "check", "1.1", "softmax_ref").output
    assert "Yours: softmax_ref. All else" in green and "softmax_ref is right" in green, green
    assert "Now: write attention_ref in " in green and "check 1.1 attention_ref" in green
    assert state(book).endswith("1 of 2 written")


def test_where_a_learner_is_is_remembered(book: Workbook) -> None:
    assert "course start 0.1" in course(book, "next").output
    assert "a chapter" not in course(book, "start", "1.1").output
    assert "Now: write softmax_ref in " in course(book, "next").output
    assert course(book, "hint").output.startswith("softmax_ref\n")
    (book.folder / "ops" / "softmax.py").unlink()
    (book.folder / "ops" / "attention.py").unlink()
    book.fill(FIRST.teaches)
    assert "Now: python main.py course check 1.1" in course(book, "next").output
    book.mark_done(FIRST)
    assert "course start 1.2" in course(book, "next").output, "the chapter behind it, not the first of all"
    chapters = read_manifest().values()
    every = dict.fromkeys(definition for it in chapters for definition in it.teaches)
    book.fill([definition for definition in every if definition not in FIRST.teaches])
    for it in chapters:
        book.mark_done(it)
    assert "All chapters are done" in course(book, "next").output
    assert "All chapters are done" in str(course(book, "start").exception)


def test_a_chapter_to_read_has_nothing_to_write(book: Workbook) -> None:
    it = next(it for it in read_manifest().values() if not it.teaches)
    for command in (["hint"], ["solution"], ["diff"], ["break"]):
        refused = str(course(book, *command, it.id).exception) if command != ["break"] else broken(it.id)
        assert f"nothing to write in chapter {it.id}: read book/docs/{it.page}" in refused, command
    assert f"Read book/docs/{it.page}, then: " in course(book, "start", it.id).output
    assert f"to be read.\nNow: read book/docs/{it.page}" in course(book, "next").output
    assert not list(book.folder.rglob("*.py"))
    book.mark_done(it)
    listed = course(book, "list").output.splitlines()
    assert next(line for line in listed if line.startswith(it.id)).endswith("done")


def broken(number: str) -> str:
    """What `course break`, which has no folder, says of a chapter."""
    return str(CliRunner().invoke(app, ["break", number]).exception)


@pytest.mark.slow
def test_all_that_is_written_is_checked_at_once(book: Workbook) -> None:
    assert "No chapter is written" in str(course(book, "check", "--all").exception)
    rope, rounds = read_manifest()["1.2"], read_manifest()["2.2"]
    book.fill([*rope.teaches, *rounds.teaches[1:]])
    green = course(book, "check", "--all").output
    assert "Chapters 1.2, all at once." in green and "1 chapters are done." in green, green
    book.add_mutant(next(it for it in rounds.mutants if it.definition == rounds.teaches[0]))
    red = course(book, "check", "--all")
    assert red.exit_code == 1 and "Chapters 1.2, 2.2" in red.output and "test_rounds.py" in red.output


@pytest.mark.slow
def test_an_error_has_one_traceback(book: Workbook) -> None:
    book.fill([SOFTMAX])
    change(book, "ops/softmax.py", "    wide =", "    nonsense\n    wide =")
    red = course(book, "check", "1.1", "softmax_ref").output
    assert red.count("E   NameError: name 'nonsense' is not defined") == 1, red
    assert " more failed as one of these did." in red and red.count("in softmax_ref\n") == 1, red


def test_start_never_overwrites(book: Workbook) -> None:
    course(book, "start", "1.1")
    change(book, "ops/softmax.py", 'raise NotImplementedError("TODO(course 1.1)")', "return mine(x)")
    before = {path: path.read_text() for path in book.folder.rglob("*.py")}
    assert course(book, "start", "1.1").output.count("kept") == 2
    assert {path: path.read_text() for path in book.folder.rglob("*.py")} == before


def test_a_method_goes_into_its_class(book: Workbook) -> None:
    methods = [f"tiny_llm.kv.dense:DenseCache.{name}" for name in ("__init__", "attend")]
    book.fill(methods)
    assert sorted(book.written()) == methods
    assert (book.folder / "kv" / "dense.py").read_text().count("class DenseCache") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("guilty", "innocent"), [(SOFTMAX, ATTENTION), (ATTENTION, SOFTMAX)])
def test_the_guilty_definition_is_found(book: Workbook, guilty: str, innocent: str) -> None:
    book.add_mutant(next(mutant for mutant in FIRST.mutants if mutant.definition == guilty))
    book.fill([innocent])
    red = course(book, "check", "1.1")
    assert red.exit_code == 1
    assert f"The fault is in {guilty.partition(':')[2]} (this chapter)" in red.output, red.output
    assert f"The fault is in {innocent.partition(':')[2]}" not in red.output
    assert state(book).endswith("to be checked")


@pytest.mark.slow
def test_two_faults_are_said_to_be_two(book: Workbook) -> None:
    for guilty in (SOFTMAX, ATTENTION):
        book.add_mutant(next(mutant for mutant in FIRST.mutants if mutant.definition == guilty))
    assert "No single one" in course(book, "check", "1.1").output


def test_a_changed_signature_is_warned_of(book: Workbook) -> None:
    book.fill([SOFTMAX, ATTENTION])
    assert list(book.drifted()) == []
    change(book, "ops/softmax.py", "def softmax_ref(x: mx.array)", "def softmax_ref(x, axis=-1)")
    (line,) = book.drifted()
    assert line == "softmax_ref(x, axis=-1) is called as softmax_ref(x) now: change its parameters."


def test_code_that_does_not_parse_is_one_line(book: Workbook) -> None:
    course(book, "start", "1.1")
    change(book, "ops/softmax.py", "raise NotImplementedError", "return (")
    error = course(book, "check", "1.1").exception
    assert isinstance(error, ConfigError) and "softmax.py:" in str(error) and "never closed" in str(error)


def test_code_that_does_not_import_is_shown(book: Workbook) -> None:
    book.fill([SOFTMAX, ATTENTION])
    change(book, "ops/softmax.py", "import mlx.core as mx", "import mlx.core as mx, nonsense")
    red = course(book, "check", "1.1")
    assert "No module named 'nonsense'" in red.output and "could not start" in str(red.exception)


def test_hints_solution_and_diff(book: Workbook) -> None:
    first = course(book, "hint", "1.1").output
    assert first.startswith("softmax_ref\n")
    assert "(1 of 2; more: python main.py course hint 1.1 softmax_ref 2)" in first
    assert "has 2 hints" in str(course(book, "hint", "1.1", "softmax_ref", "3").exception)
    assert course(book, "hint", "1.1", "attention_ref", "2").output.startswith("attention_ref\n")
    assert "Did you mean 'attention_ref'" in str(course(book, "hint", "1.1", "atention_ref").exception)
    assert "grouped_q = q.reshape" in course(book, "solution", "1.1").output
    assert "grouped_q = q.reshape" not in course(book, "solution", "1.1", "softmax_ref").output
    book.fill(FIRST.teaches)
    assert "to the letter" in course(book, "diff", "1.1").output
    change(book, "ops/attention.py", " * scale", "")
    assert "+    scores = mx.matmul(grouped_q, keys) * scale" in course(book, "diff", "1.1").output


def test_unknown_chapters_and_mistakes_are_refused(book: Workbook) -> None:
    refused = str(course(book, "start", "9.9").exception)
    assert refused.startswith("There is no chapter '9.9'; there are ") and " 1.1" in refused
    assert "there are softmax-over-columns" in str(course(book, "break", "1.1", "x").exception)


def test_a_mistake_is_told_by_what_it_does(book: Workbook) -> None:
    listed = course(book, "break", "1.1").output
    assert "weights are too sharp" in listed and "keys) * scale" not in listed
    assert "attention_ref: keys) * scale  ->  keys)" in course(book, "break", "1.1", "--code").output


def test_break_writes_a_folder_to_try(book: Workbook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(book.folder.parent)
    for _ in range(2):
        done = course(book, "break", "1.1", "not-scaled")
        assert (
            done.exit_code == 0
            and done.output.startswith("not-scaled")
            and "--course .cache/course/1.1-not-scaled" in done.output
        )
    assert "keys) * scale" not in Path(".cache/course/1.1-not-scaled/ops/attention.py").read_text()


def test_the_command_line_passes_on(run, tmp_path: Path) -> None:
    done = run("main.py", "course", "list", "--folder", tmp_path)
    assert done.returncode == 0 and "not begun" in done.stdout
    wrong = run("main.py", "course", "start", "7", "--folder", tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: There is no chapter '7'")


def test_the_list_outside_of_a_checkout_is_an_error_and_no_header(
    book: Workbook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "read_manifest", lambda: read_manifest(tmp_path))
    refused = course(book, "list")
    assert isinstance(refused.exception, ConfigError) and "needs a checkout" in str(refused.exception)
    assert refused.output == ""
