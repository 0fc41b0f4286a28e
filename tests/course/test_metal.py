"""A learner's Metal: put into the project's text at their lines, run by metalsim; and chapter 2.4's page."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner, Result

from book.course.check import to_blame
from book.course.commands import app
from book.course.manifest import ROOT, read_manifest
from book.course.native import prepare
from book.course.sections import stub
from book.course.workbook import Workbook, reference
from tiny_llm.config import Quantization
from tiny_llm.errors import ConfigError
from tiny_llm.metalsim.build import why_not
from tiny_llm.ops import metal
from tiny_llm.weights.quantize import quantize_matrix

pytestmark = pytest.mark.slow

IT = read_manifest()["2.4"]
CHUNK, ROWS, STORE, _ = IT.teaches
FILE = "kernels/metal/quantized_matmul.metal"
PAGE = (ROOT / "book" / "docs" / IT.page).read_text(encoding="utf-8")
EXPERIMENT = "book/experiments/quantized_matmul_gpu.py"
simulated = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def course(book: Workbook, *arguments: str) -> Result:
    """One command on the learner's folder."""
    return CliRunner().invoke(app, [*arguments, "--folder", str(book.folder)])


def table(number: int) -> str:
    """What the page says that its experiment prints."""
    return re.findall(r"^```text\n(.*?)^```$", PAGE, re.S | re.M)[number]


def mutant(book: Workbook, name: str) -> Workbook:
    """The folder with one mistake in it."""
    book.add_mutant(next(m for m in IT.mutants if m.name == name))
    return book


def test_a_stub_of_a_function_that_returns_nothing_returns_nothing() -> None:
    text = stub(reference(FILE), "store_rows", "2.4")
    assert text.endswith("int part) {\n    // TODO(course 2.4)\n}\n// end 2.4\n"), text


def test_the_kernels_keep_their_lines_behind_a_part_of_other_length(book: Workbook, run) -> None:
    book.fill([CHUNK])
    path = book.folder / FILE
    path.write_text(path.read_text().replace("    float scales[2]", "\n\n\n    float scales[2]"))
    name = "quantized_matmul_gated"
    read = f"from tiny_llm.ops import metal; text = metal.texts('quantized_matmul')['{name}']"
    code = f"{read}; print(text.header, text.body)"
    merged = run("-c", code, TINY_LLM_COURSE=book.folder, PYTHONPATH=ROOT).stdout
    expected = metal.texts("quantized_matmul")[name]
    assert (
        expected.body in merged and '#line 4 "your quantized_matmul.metal"\n// begin 2.4 add_chunk' in merged
    )


@simulated
def test_an_error_is_shown_at_the_learner_s_line(book: Workbook) -> None:
    book.fill([STORE])
    path = book.folder / FILE
    path.write_text(path.read_text().replace("int o = column", "int o = nonsense"))
    line = path.read_text().partition("nonsense")[0].count("\n") + 1
    red = course(book, "check", "2.4", "store_rows")
    assert f"your quantized_matmul.metal:{line}: error: use of undeclared identifier 'nonsense'" in red.output


@simulated
def test_the_guilty_part_is_found(book: Workbook) -> None:
    mutant(book, "stored-by-columns").fill([ROWS])
    assert list(to_blame(IT, book.folder, [ROWS, STORE])) == [STORE]


def test_where_nothing_runs_metal_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("book.course.native.why_not", lambda: "There is no clang.")
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(ConfigError, match="needs a Mac's GPU, or metalsim, which says: There is no clang"):
        prepare(FILE, Path())


@simulated
def test_the_bundled_model_runs_on_a_learner_s_metal(run, book: Workbook) -> None:
    book.fill(IT.teaches)
    asked = ("generate", "--prompt", "What is 48 + 35?", "--max-tokens", "12", "--quantize", 4)
    options = ("--backend", "metalsim", "--course", book.folder)
    assert "83" in run("main.py", *asked, *options, TINY_LLM_METALSIM="fast").stdout


def test_the_predictions() -> None:
    matrix = quantize_matrix(mx.random.normal((4864, 896)).astype(mx.bfloat16), Quantization(4, 64))
    once = (matrix.packed.nbytes + matrix.scales.nbytes + matrix.biases.nbytes) / 1e6
    assert f"**{4 * once:.1f} MB**, shared it is **{once:.1f} MB**" in PAGE
    chunks, turns = 896 // 32, -(-896 // 32 // 8)
    assert f"**{1 - chunks / (8 * turns):.1%}**".replace("%", " %") in PAGE


@simulated
def test_the_table_and_the_picture(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == table(1), f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/quantized_matmul_gpu.svg").read_text(), "draw it again"


@simulated
def test_the_planted_race_is_reported_as_told(run) -> None:
    told, expected = run(EXPERIMENT, "--mistake", "every-lane-writes", PYTHONPATH=ROOT).stdout, table(0)
    assert re.sub(r"[\d\s]+", "#", told) == re.sub(r"[\d\s]+", "#", expected), told
