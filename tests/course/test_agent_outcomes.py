"""Chapter 3.9: its tables are what the experiment prints, its answers are computed, the mistakes as told."""

from __future__ import annotations

import re
from math import comb
from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of, tables_of

PAGE, TABLES = page_of("3.9"), tables_of("3.9")

EXPERIMENT = "book/experiments/agent_outcomes.py"


@pytest.mark.slow
def test_the_table_and_the_picture(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[1], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/agent_outcomes.svg").read_text(), "draw it again"
    assert re.findall(r">(passes|fails)<", drawn.read_text()) == ["fails"] * 2 + ["passes"] * 3 + ["fails"]
    rows = {line[:9].strip(): [float(n) for n in line[9:].split()] for line in printed.splitlines()[1:4]}
    quick, careful, by_heart = (rows[name] for name in ("quick", "careful", "by heart"))
    assert quick[0] == careful[0] == by_heart[0] == 20, "by what they say they are equal"
    assert by_heart[1] == careful[1] > quick[1] and by_heart[2] == 0 < quick[2] < careful[2] < careful[1]
    assert round(careful[3] / quick[3]) == 3, "three times the steps"
    assert quick[5] < careful[5] == by_heart[5] > 0.98 * careful[4], "all but the end"


@pytest.mark.slow
def test_the_mistakes(run) -> None:
    printed = run(EXPERIMENT, "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == TABLES[0], f"copy this into the page:\n{printed}"
    right, *others = [line[22:].split() for line in printed.splitlines()[1:]]
    assert right[:2] == ["careful", "yes"] and all(other != right for other in others)
    assert "Error" not in printed, "none of them ends with one"


def test_the_predictions() -> None:
    alone, shared = 4 * 6020, 6020 + 3 * 20
    assert f"4 x 6,020 = **{alone:,}**" in PAGE and f"6,020 + 3 x 20 = **{shared:,}**" in page_of("3.9")
    assert 6000 / 16 == 375 and round(alone / shared) == 4
    chance = 2 * sum(comb(5, k) for k in (4, 5)) / 2**5
    assert f"2 x (5 + 1) / 32 = **{chance:.1%}**".replace("%", " %") in PAGE
