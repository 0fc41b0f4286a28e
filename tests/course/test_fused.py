"""Chapter 2.7: tables are what the experiment prints, answers are computed, judgements as told."""

from __future__ import annotations

import re
import shutil
from math import comb
from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of, tables_of

PAGE, TABLES = page_of("2.7"), tables_of("2.7")

EXPERIMENT = "book/experiments/fused.py"


def frame(table: str) -> str:
    """A table without its numbers."""
    return re.sub(r"[-+]?[\d.]+", "#", re.sub(r" +", " ", table))


def test_what_is_counted_and_drawn(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[1], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/fused.svg").read_text(), "draw it again"


def test_the_predictions_of_2_7() -> None:
    page, saved = PAGE, 4 * 4864 * 4 * 128 * 24
    assert f"are {saved / 1e6:.0f} MB: **{saved / 25e9 * 1e3:.1f} ms**" in page
    assert f"24 times: **{24 * 2e-3:.2f} ms**" in page
    rows = {name: float(cells[0]) for name, cells in measured(3).items()}
    whole, one = rows["all three fused"], float(measured(2)["all three fused"][0])
    assert f"9.6 of {whole:.0f} is **{9.6 / whole:.0%}**".replace("%", " %") in page
    assert f"0.05 of {one:.0f} is **{0.05 / one:.1%}**".replace("%", " %") in page


def measured(number: int) -> dict[str, list[str]]:
    """Each way's cells in a table of times."""
    lines = TABLES[number].splitlines()[1:]
    return {line[:25].strip(): re.split(r" {2,}", line[25:].strip()) for line in lines}


def by_chance(heads: int, of: int) -> float:
    """How often a coin falls so many times on one side, or more."""
    return sum(comb(of, number) for number in range(heads, of + 1)) / 2**of


def test_the_judgements_of_2_7() -> None:
    """Figures of the text stand in the tables, and chance is computed."""
    page, one, many = PAGE, measured(2), measured(3)
    assert f"saves {many['SwiGLU apart'][2].lstrip('+')} of a prompt".replace("%", " %") in page
    assert float(one["SwiGLU apart"][0]) - float(one["all three fused"][0]) == pytest.approx(10 * 0.05)
    lost = [table["q and k put together"][2].lstrip("+").replace("%", " %") for table in (one, many)]
    assert f"loses {lost[0]} with one token and {lost[1]} with 128" in page
    assert one["a sum and its norm apart"][3].split()[0] == one["q and k apart"][3].split()[0] == "54"
    assert round(by_chance(54, 80), 3) == 0.001 and "about once in a thousand" in page
    assert many["a sum and its norm apart"][3].startswith("26 of 40")
    assert round(1 / by_chance(26, 40)) == 25 and "one time in 25" in page


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_the_mistakes_of_2_7(run) -> None:
    """Which ones show; what exactly a broken model says may differ on another machine."""
    printed = run(EXPERIMENT, "--mistakes", PYTHONPATH=ROOT).stdout
    found, told = (
        [(line[:26].strip(), line.endswith("48 + 35 = 83")) for line in table.splitlines()]
        for table in (printed, TABLES[0])
    )
    assert found == told and sum(right for _, right in told) == 2, printed


@pytest.mark.slow
def test_the_speeds_of_2_7(run) -> None:
    done = run(EXPERIMENT, "--speed", "--rounds", "1", PYTHONPATH=ROOT)
    assert frame(done.stdout) == frame(TABLES[2]) == frame(TABLES[3]), done.stderr
