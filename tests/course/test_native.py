"""A learner's C++: compiled at their lines, run in the product, and no harm done when it crashes or hangs."""

from __future__ import annotations

import re
import shutil

import pytest
from typer.testing import CliRunner, Result

from book.course.check import run_tests
from book.course.commands import app
from book.course.manifest import read_manifest
from book.course.native import build
from book.course.sections import check, definitions, merged, stub, whole
from book.course.workbook import Workbook
from tiny_llm.errors import ConfigError

pytestmark = pytest.mark.slow

IT = read_manifest()["2.3"]
FILE = "kernels/cpu/quantized_rows.cpp"
SCALAR, VECTOR = IT.teaches
REFERENCE = "int a;\n// begin 1.1 f\nint f(int x) {\n    return x;\n}\n// end 1.1\nint b;\n"
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


def course(book: Workbook, *arguments: str) -> Result:
    """One command on the learner's folder."""
    return CliRunner().invoke(app, [*arguments, "--folder", str(book.folder)])


def write(book: Workbook, old: str, new: str) -> None:
    """The reference's parts, one of them changed."""
    book.fill(IT.teaches)
    path = book.folder / FILE
    assert path.read_text().count(old) >= 1
    path.write_text(path.read_text().replace(old, new, 1))


def test_parts_are_cut_and_put_together() -> None:
    assert definitions(REFERENCE) == {"f": False}
    todo = stub(REFERENCE, "f", "1.1")
    assert todo == "// begin 1.1 f\nint f(int x) {\n    return {};  // TODO(course 1.1)\n}\n// end 1.1\n"
    assert definitions(todo) == {"f": True} and whole(todo, "f") == todo
    assert "#line" not in merged(REFERENCE, "r.cpp", todo, "own.cpp", []).replace('#line 1 "r.cpp"', "")
    own = "// Mine.\n\n" + whole(REFERENCE, "f").replace("return x", "return 2 * x")
    text = merged(REFERENCE, "r.cpp", own, "own.cpp", [])
    assert '#line 3 "own.cpp"\n// begin 1.1 f\nint f(int x) {\n    return 2 * x;' in text
    assert '// end 1.1\n#line 7 "r.cpp"\nint b;' in text
    assert "2 * x" not in merged(REFERENCE, "r.cpp", own, "own.cpp", ["f"])


def test_a_lost_mark_is_said() -> None:
    with pytest.raises(ConfigError, match=r"mine.cpp: a mark is missing"):
        check(REFERENCE.replace("// end 1.1\n", ""), "mine.cpp")


def test_start_writes_the_parts_alone(book: Workbook) -> None:
    assert course(book, "start", "2.3").output.count(FILE) == 2
    text = (book.folder / FILE).read_text()
    assert "float dot_scalar(const Row& row" in text and "parallel_for" not in text
    assert "still to be written" in str(course(book, "check", "2.3").exception)


@needs_compiler
def test_an_error_is_shown_at_the_learner_s_line(book: Workbook, capfd: pytest.CaptureFixture[str]) -> None:
    write(book, "float y = 0;", "float y = nonsense;")
    with pytest.raises(ConfigError, match="does not compile"):
        build("quantized_rows", book.folder)
    error = capfd.readouterr().err
    line = (book.folder / FILE).read_text().partition("nonsense")[0].count("\n") + 1
    assert re.search(rf"quantized_rows.cpp:{line}:\d+: error: .*nonsense", error), error


@needs_compiler
def test_the_guilty_part_is_found(book: Workbook) -> None:
    book.add_mutant(next(mutant for mutant in IT.mutants if mutant.definition == SCALAR))
    book.fill([VECTOR])
    red = course(book, "check", "2.3")
    assert red.exit_code == 1 and "The fault is in dot_scalar (this chapter)" in red.output, red.output


@needs_compiler
def test_a_crash_is_reported(book: Workbook) -> None:
    write(book, "float y = 0;", "float y = words[int64_t(1) << 40];")
    error = str(course(book, "check", "2.3").exception)
    assert "Your code crashed (SIGSEGV). It was in test_each_weight_by_itself" in error, error


@needs_compiler
def test_a_loop_that_does_not_end_is_reported(book: Workbook) -> None:
    write(book, "float y = 0;", "float y = 0;\n    for (volatile int i = 0; i < 1;) y += 1;")
    with pytest.raises(ConfigError, match=r"did not end within 12 s: .* It was in test_\w+, tests/ops/"):
        run_tests([IT], book.folder, seconds=12)


def test_without_a_compiler_it_says_so(book: Workbook, monkeypatch: pytest.MonkeyPatch) -> None:
    book.fill(IT.teaches)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "needs a C++ compiler" in str(course(book, "check", "2.3").exception)


@needs_compiler
def test_the_bundled_model_runs_on_a_learner_s_kernel(run, book: Workbook) -> None:
    book.fill(IT.teaches)
    asked = ["generate", "--prompt", "What is 48 + 35?", "--max-tokens", "12", "--quantize", "4"]
    assert "83" in run("main.py", *asked, "--course", book.folder).stdout
