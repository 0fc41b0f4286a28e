"""Chapter 4.2: tables are what the experiment prints, answers are computed, the symptom as told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from book.course.manifest import ROOT, read_manifest
from tests.course.conftest import page_of

PAGE = page_of("4.2")

pytestmark = pytest.mark.slow


def numbers(printed: str) -> list[float]:
    """All numbers of a table, in order."""
    return [float(one.replace(",", "")) for one in re.findall(r"\d[\d,]*\.?\d*", printed)]


def test_the_tables_of_4_2(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run("book/experiments/kv_quantization.py", "--svg", drawn, PYTHONPATH=ROOT).stdout
    (shown,) = re.findall(r"^```text\n(.*?)^```$", PAGE, re.S | re.M)
    assert re.sub(r"[\d., ]+", " ", printed) == re.sub(r"[\d., ]+", " ", shown), printed
    assert numbers(printed) == pytest.approx(numbers(shown), rel=0.3, abs=0.02), f"copy this:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/kv_quantization.svg").read_text(), "draw it again"
    rows = {line[:26].strip(): line[26:].split() for line in printed.splitlines()[1:7]}
    loss = {name: float(row[1]) for name, row in rows.items()}
    ours, token, batch, fixed, four = (loss[name] for name in list(loss)[1:])
    assert loss["bfloat16"] < ours < token < batch < four < fixed, "fewer scales lose more"


def test_the_predictions_of_4_2() -> None:
    page, vectors = PAGE, 24 * 4
    assert f"= **{vectors * 64 * 2:,}** bytes" in page and f"(64 + 2) = **{vectors * 66:,}**" in page
    assert f"**{128 / 66:.2f}** times" in page and f"128 it is {256 / 130:.2f}" in page
    assert f"100 / 127 = {100 / 127:.2f}" in page and 6 < 5 / (100 / 127) < 7 < 2**3


def test_the_symptom_of_4_2_is_as_told(run, book) -> None:
    book.add_mutant(next(m for m in read_manifest()["4.2"].mutants if m.name == "scales-swapped"))
    asked = "The password of the red door is zimbro. Which password opens the red door?"
    words = ("main.py", "generate", "--prompt", asked, "--max-tokens", "8", "--kv-dtype", "int8")
    told = run(*words, "--course", book.folder).stdout
    assert told.split()[:4] == ["lived"] * 4 and "lived lived lived lived" in PAGE
