"""Chapter 2.5's page: its table is what the experiment prints, predictions are computed, its kernel chats."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from book.course.manifest import ROOT, read_manifest
from book.course.sections import stub
from book.course.workbook import Workbook, reference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
]

IT = read_manifest()["2.5"]
PAGE = (ROOT / "book" / "docs" / IT.page).read_text(encoding="utf-8")
TABLES = [table for table in re.findall(r"^```text\n(.*?)^```$", PAGE, re.S | re.M) if "   " in table]
EXPERIMENT = "book/experiments/flash_attention.py"


def test_the_predictions() -> None:
    assert f"**{14 * 32768 * 32768 * 4 / 1e9:.1f} GB**" in PAGE and f"**{16 * 256 * 4 // 1024} KB**" in PAGE
    assert f"**{2.0 ** (3 - 4):g}**" in PAGE and f"{2 ** (2.6 - 3.2):.2f}, which rounds" in PAGE


def test_the_memory_and_the_picture(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[0], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/flash_attention.svg").read_text(), "draw it again"


def test_a_stub_of_a_template_that_returns_nothing_returns_nothing() -> None:
    text = stub(reference("kernels/cpu/attention.cpp"), "weigh_rows", "2.5")
    assert text.endswith("int64_t columns) {\n    // TODO(course 2.5)\n}\n// end 2.5\n"), text


def test_the_bundled_model_runs_on_a_learner_s_attention(run, book: Workbook) -> None:
    book.fill(IT.teaches)
    asked = ("generate", "--prompt", "What is 48 + 35?", "--max-tokens", "12")
    told = run("main.py", *asked, "--course", book.folder, TINY_LLM_COURSE_QUICK="1")
    assert "83" in told.stdout
