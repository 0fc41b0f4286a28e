"""Chapter 2.8's page: tables and picture are what the experiment makes, and predictions are computed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of
from tiny_llm.metalsim.build import why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

PAGE = page_of("2.8")
TOLD, MEASURED = re.findall(r"^```text\n([mr].*?)^```$", PAGE, re.S | re.M)
EXPERIMENT = "book/experiments/tiles.py"


def test_the_predictions_of_2_8() -> None:
    lines = MEASURED.splitlines()
    rows, grid = {line.split()[0]: line.split() for line in lines[1:9]}, lines[11]
    tiles, _, shared = grid.split()[-3:]
    assert grid.startswith("keys") and f"**{tiles}** tiles, **{shared}** simdgroups" in PAGE
    assert int(tiles) == 128 // 32 and int(shared) == 8 * int(tiles)
    whole = 64 * 896 * 4.5 / 8 / 1e3
    assert f"**{whole:.1f} KB**" in PAGE and f"**{2 * whole:.1f} KB**" in PAGE
    assert rows["32"][3] == f"{whole:.1f}" and rows["40"][3] == f"{2 * whole:.1f}"
    assert f"of 64 rows 24 are nobody's, **{24 / 64:.0%}**".replace("%", " %") in PAGE.replace("\n    ", " ")
    assert rows["40"][2] == "38%"


def test_the_table_and_the_picture_of_2_8(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == MEASURED, f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/tiles.svg").read_text(), "draw it again"


def test_the_mistakes_of_2_8(run) -> None:
    printed = run(EXPERIMENT, "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == TOLD, f"copy this into the page:\n{printed}"
    told = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:]}
    assert told["(none)"][1] == "0%" and told["room-used-too-soon"] == ["race"]
    assert round(float(told["an-eighth-each"][1].rstrip("%")) / 20) == 4, "four numbers of five"
