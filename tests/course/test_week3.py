"""Chapter 3.1: tables are what the experiment prints, answers are computed, symptoms as told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of, tables_of

PAGE, TABLES = page_of("3.1"), tables_of("3.1")

pytestmark = pytest.mark.slow


def test_the_predictions_of_3_1() -> None:
    text, slots, size = PAGE, 16_384, 16
    wasted = sum(range(size)) / size
    assert (
        f"16,384 / 2,048 = **{slots // 2048}**" in text
        and f"At best, with no slot wasted: **{slots // 430}**" in text
    )
    assert f"{wasted} on average: **{100 * wasted / (430 + wasted):.1f} %** of {430 + wasted}" in text
    alone, shared = -(-1100 // size), 1000 // size
    assert f"takes {alone}, four of them **{4 * alone}**" in text and f"the {shared} full blocks" in text
    assert f"**{shared + 4 * (alone - shared)}**" in text


def test_the_tables_of_3_1(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run("book/experiments/blocks.py", "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[1], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/blocks.svg").read_text(), "draw it again"
    at_once = re.findall(r">(\d+) at once", drawn.read_text())
    assert at_once == ["8", "13", "40"], "the page's picture is described in words, too"
    foretold = next(line for line in printed.splitlines() if "foretold" in line)
    assert f"{float(foretold.split()[-2].rstrip('%')):.0f} % of the pool lie in holes" in PAGE
    copied = {int(line.split()[0]): int(line.split()[-1]) for line in printed.splitlines()[-4:]}
    assert f"Copied: **{copied[4]}**" in PAGE


def test_the_mistakes_of_3_1(run) -> None:
    printed = run("book/experiments/blocks.py", "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == TABLES[0], f"copy this into the page:\n{printed}"
    right, *_, last_but_one, last = printed.splitlines()[1:]
    assert right.split()[1:] == ["0.0%", str(19 * 3), "0"], "nineteen questions make three copies each"
    assert last.split()[1] == last_but_one.split()[1] == "0.0%", "they only cost"
