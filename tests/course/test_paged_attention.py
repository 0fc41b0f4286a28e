"""Chapter 3.2's page: tables and picture are what the experiment makes, and predictions are computed."""

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

PAGE = page_of("3.2")
TOLD, MEASURED = re.findall(r"^```text\n([ml].*?)^```$", PAGE, re.S | re.M)
EXPERIMENT = "book/experiments/paged_attention.py"


def test_the_predictions_of_3_2() -> None:
    padded, gathered, by_table, foretold = MEASURED.splitlines()[-1].split()[-4:]
    assert f"4 x 500 x 256 bytes = **{padded} KB**" in PAGE and float(padded) * 1e3 == 4 * 500 * 256
    rooms = [-(-end // 16) * 16 for end in (10, 20, 40, 500)]
    assert f"{' + '.join(map(str, rooms))} = {sum(rooms)} tokens" in PAGE
    assert f"**{gathered} KB**" in PAGE and f"{3 * sum(rooms) * 256 / 1e3:.1f}" == gathered
    assert f"570 tokens, **{by_table} KB**" in PAGE and by_table == foretold == f"{570 * 256 / 1e3:.1f}"
    seen = range(500 - 150, 500)
    first, last = ([token for token in seen if token // 128 == span] for span in (2, 3))
    assert (
        len(first) + len(last) == 150 and f"are **{len(first)}**" in PAGE and f"are **{len(last)}**" in PAGE
    )


def test_the_table_and_the_picture_of_3_2(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == MEASURED, f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/paged_attention.svg").read_text(), "draw it again"


def test_the_mistakes_of_3_2(run) -> None:
    printed = run(EXPERIMENT, "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == TOLD, f"copy this into the page:\n{printed}"
    rows = [line.split()[1:] for line in printed.splitlines()[1:]]
    assert rows[0] == ["right", "0%", "930"] and [row[0] for row in rows[1:]].count("right") == 4
    assert all(row[1] != "0%" and row[2] == "930" for row in rows[3:]), "the last three differ by bits alone"
