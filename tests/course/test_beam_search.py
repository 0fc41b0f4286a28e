"""Chapter 4.3: tables are what the experiment prints, answers are computed, the mistakes as told."""

from __future__ import annotations

from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of, tables_of

PAGE, TABLES = page_of("4.3"), tables_of("4.3")

pytestmark = pytest.mark.slow
EXPERIMENT = "book/experiments/beam_search.py"


def test_the_tables_of_4_3(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[2], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/beam_search.svg").read_text(), "draw it again"
    alone, *_, eight = [line.split() for line in printed.rstrip().splitlines()[-4:]]
    page = PAGE.replace("\n", " ")
    assert f"Eight beams hold {int(eight[3]) - int(alone[3])} blocks more than one" in page
    assert int(eight[4]) < int(eight[1]) and f"With {eight[1]} forks in 63 steps" in page
    times = int(eight[5].replace(",", "")) / int(eight[4])
    assert round(times, -1) == 70 and "seventy times as much" in page


def test_the_mistakes_of_4_3(run) -> None:
    printed = run(EXPERIMENT, "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == TABLES[1], f"copy this into the page:\n{printed}"


def test_the_predictions_of_4_3() -> None:
    page = PAGE
    assert f"0.6 x 0.4 = **{0.6 * 0.4:.2f}**, and 0.4 x 0.9 = **{0.4 * 0.9:.2f}**" in page
    token = 56 * 1024
    assert f"**{1000 * token / 1e6:.1f} MB**" in page and f"**{16 * token / 1e6:.1f} MB**" in page
