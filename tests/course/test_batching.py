"""Chapter 2.9: tables are what the experiment prints, answers are computed, symptoms as told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of, tables_of

PAGE, TABLES = page_of("2.9"), tables_of("2.9")

pytestmark = pytest.mark.slow


def steps_joining(answers: list[int], places: int) -> int:
    """Steps until all are served who join as soon as there is a place."""
    ends = [0] * places
    for answer in answers:
        ends[ends.index(min(ends))] += answer
    return max(ends)


def test_the_predictions_of_2_9() -> None:
    text, answers = PAGE, [50, 50, 50, 350] * 2
    batches = sum(max(answers[at : at + 4]) for at in (0, 4))
    assert f"Two batches of 350: **{batches}**" in text
    assert f"**{1 - sum(answers) / (4 * batches):.0%}**".replace("%", " %") in text
    assert f"**{steps_joining(answers, 4)}** steps" in text
    assert f"15 + 500 = **{15 + 500}**" in text and f"16 x 500 = **{16 * 500:,}**" in text


def test_the_tables_of_2_9(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run("book/experiments/batching.py", "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[1], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/batching.svg").read_text(), "draw it again"
    seconds = [int(re.split(r"\s{2,}", line)[2]) for line in printed.splitlines()[1:]]
    assert f"saves {1 - seconds[2] / seconds[1]:.0%} of the time".replace("%", " %") in PAGE


def test_the_mistakes_of_2_9(run) -> None:
    printed = run("book/experiments/batching.py", "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == TABLES[0], f"copy this into the page:\n{printed}"
    right, *_, last = printed.splitlines()[1:]
    computed = [int(line.split()[3].replace(",", "")) for line in (right, last)]
    assert right.split()[1] == last.split()[1] == "0%" and computed[1] > computed[0], "it only computes again"
