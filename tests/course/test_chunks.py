"""Chapter 2.10: tables are what the experiment prints, answers are computed, symptoms as told."""

from __future__ import annotations

import re
from math import ceil
from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of, tables_of
from tiny_llm.scheduler.speed import context_of

PAGE, TABLES = page_of("2.10"), tables_of("2.10")

pytestmark = pytest.mark.slow


def test_the_predictions_of_2_10() -> None:
    text = PAGE
    alone = 20 + 8 * 0.1
    assert f"= **{alone + 800:.0f} ms**" in text
    tokens = round((45 - alone) / 0.1)
    steps = ceil(8000 / tokens)
    assert f"= **{tokens}** tokens" in text and f"**{steps}** steps are needed, {steps * 0.045:.1f} s" in text
    first, deep = context_of(0, 512), context_of(7488, 512)
    assert f"**{first:,}**" in text and f"**{deep:,}**, thirty times" in text and round(deep / first) == 30


def test_the_tables_of_2_10(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run("book/experiments/chunks.py", "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[1], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/chunks.svg").read_text(), "draw it again"
    rows = [re.split(r"\s{2,}", line) for line in printed.splitlines()[1:4]]
    (gap, wait), (less, longer), (_, twice) = [
        (int(row[1].split()[0]), float(row[3].split()[0])) for row in rows
    ]
    text = PAGE
    assert round(gap / less) in (5, 6) and f"for {longer - wait:.2f} s more" in text and twice > 2 * longer


def test_the_mistakes_of_2_10(run) -> None:
    printed = run("book/experiments/chunks.py", "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == TABLES[0], f"copy this into the page:\n{printed}"
