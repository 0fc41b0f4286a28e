"""Chapter 4.6: tables are what the experiment prints, answers are computed, the mistakes as told."""

from __future__ import annotations

from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of, tables_of
from tiny_llm.metalsim.build import why_not

PAGE, TABLES = page_of("4.6"), tables_of("4.6")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason="metalsim cannot run here")]
EXPERIMENT = "book/experiments/cascade_attention.py"


def test_the_table_of_4_6(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[1], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/cascade_attention.svg").read_text(), "draw it again"
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[2:]}
    assert all(foretold == counted for _, foretold, counted, *_ in rows.values()), "it is met to the byte"
    assert rows["16"][3] == rows["32"][3] == "12%", "an eighth is left"
    assert 0.6 < float(rows["16"][4]) / float(rows["16"][2]) < 0.7, "two thirds"


def test_the_mistakes_of_4_6(run) -> None:
    printed = run(EXPERIMENT, "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == TABLES[0], f"copy this into the page:\n{printed}"
    told = {line[:22].strip(): line[22:].split() for line in printed.splitlines()[1:]}
    wrong, read = (float(told["same-block-same-place"][i].rstrip("%")) for i in (0, 1))
    assert 0 < wrong < 50 and read < float(told["(none)"][1].rstrip("%"))


def test_the_predictions_of_4_6() -> None:
    page, token = PAGE, 56 * 1024
    assert f"**{64 * 2304 * token / 1e9:.2f} GB**" in page
    together = (4 * 2048 + 64 * 256) * token
    assert f"**{together / 1e9:.2f} GB**, a sixth" in page and round(64 * 2304 * token / together) == 6
    parts, seen = 18 * 28 * 130 * 4, 2304 * 2048
    assert (
        round(parts / 1e3) == 262
        and f"{seen / 1e6:.2f} MB: **{parts / seen:.1%}**".replace("%", " %") in page
    )
    assert f"\n    {round(100 * (2304 / 16) * 28 * 130 * 4 / seen)} %" in page


def test_the_answers_of_4_6() -> None:
    assert 1030 // 128 == 8 and 8 * 128 == 1024 and 500 // 128 == 3 and "Eight: 1,024 tokens" in PAGE
