"""Chapter 2.11: tables are what the experiment prints, answers are computed, symptoms as told."""

from __future__ import annotations

from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of, tables_of
from tiny_llm.data import StepCosts
from tiny_llm.scheduler.drafts import Worth
from tiny_llm.scheduler.speed import StepTime

PAGE, TABLES = page_of("2.11"), tables_of("2.11")

pytestmark = pytest.mark.slow


def test_the_predictions_of_2_11() -> None:
    text = PAGE
    assert f"= **{sum(0.8**n for n in range(5)):.2f}**" in text and f"= **{1 / (1 - 0.8):.0f}**" in text
    speed = StepTime(StepCosts(20.0, 0.5, 0.0, 0.5, 0.0))
    speed._doubts = [[0.0] * 5 for _ in range(5)]
    assert f"the sixth does not: **{Worth(speed, 1, 0).length(0.6, 16)}**" in text
    assert f"not quite a token for 0.83: **{Worth(speed, 256, 0).length(0.6, 16)}**" in text


def test_the_tables_of_2_11(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run("book/experiments/speculation.py", "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[1], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/speculation.svg").read_text(), "draw it again"
    for line in printed.splitlines()[1:7]:
        foretold, counted = map(float, line.split()[-2:])
        assert abs(foretold - counted) < 0.05 * counted, "they agree"


def test_the_mistakes_of_2_11(run) -> None:
    printed = run("book/experiments/speculation.py", "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == TABLES[0], f"copy this into the page:\n{printed}"
    lies = [line.split()[0] for line in printed.splitlines()[1:] if line.split()[1] != "0%"]
    assert lies == ["all-are-kept", "by-token-alone"], "the first and the third of the mistakes"
