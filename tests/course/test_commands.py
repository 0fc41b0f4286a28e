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
    takes_folder = arguments[0] not in ("hint", "solution", "break")
    return CliRunner().invoke(app, [*arguments, *(["--folder", str(book.folder)] if takes_folder else [])])


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
    assert "(1 of 4; more: python main.py course hint 1.1 2)" in course(book, "hint", "1.1").output
    assert "4 hints" in str(course(book, "hint", "1.1", "5").exception)
    assert "grouped_q = q.reshape" in course(book, "solution", "1.1").output
    book.fill(FIRST.teaches)
    assert "to the letter" in course(book, "diff", "1.1").output
    change(book, "ops/attention.py", " * scale", "")
    assert "+    scores = mx.matmul(grouped_q, keys) * scale" in course(book, "diff", "1.1").output


def test_unknown_chapters_and_mistakes_are_refused(book: Workbook) -> None:
    refused = str(course(book, "start", "9.9").exception)
    assert refused.startswith("There is no chapter '9.9'; there are ") and " 1.1" in refused
    assert "there are softmax-over-columns" in str(course(book, "break", "1.1", "x").exception)


def test_break_writes_a_folder_to_try(book: Workbook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(book.folder.parent)
    for _ in range(2):
        done = course(book, "break", "1.1", "not-scaled")
        assert done.exit_code == 0 and "--course .cache/course/1.1-not-scaled" in done.output
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
