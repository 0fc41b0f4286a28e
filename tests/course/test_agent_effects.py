"""Chapter 3.8: its tables are what the experiment prints, its answers are computed, the mistakes as told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of, tables_of

PAGE, TABLES = page_of("3.8"), tables_of("3.8")

EXPERIMENT = "book/experiments/agent_effects.py"


@pytest.mark.slow
def test_the_table_and_the_picture(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[1], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/agent_effects.svg").read_text(), "draw it again"
    rows = [re.match(r"(.+?)\s+(\d) +(\d)   (.+)", line) for line in printed.splitlines()[1:]]
    assert len(rows) == 12 and all(row and int(row[3]) <= 1 for row in rows), "asked once more at most"


@pytest.mark.slow
def test_the_mistakes(run) -> None:
    printed = run(EXPERIMENT, "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == TABLES[0], f"copy this into the page:\n{printed}"
    right, *others = [list(map(int, line.split()[2:])) for line in printed.splitlines()[1:]]
    assert not any(right) and all(map(any, others)), "each goes wrong, the right one never"


def test_the_predictions() -> None:
    assert f"5 of 40,005 milliseconds: **{1e6 * 5 / 40_005:.0f}**" in PAGE
    assert f"**{1000 - 3 + 1}** records" in PAGE
