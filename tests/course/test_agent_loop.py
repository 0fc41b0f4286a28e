"""Chapter 3.7: its tables are what the experiment prints, its answers are computed, the mistakes as told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of

PAGE = page_of("3.7")

EXPERIMENT = "book/experiments/agent_loop.py"


def tables() -> list[str]:
    """What the page says that its experiment prints; the first text is an answer's form."""
    return re.findall(r"^```text\n(.*?)^```$", PAGE, re.S | re.M)[1:]


@pytest.mark.slow
def test_the_table_and_the_picture(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == tables()[1], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/agent_loop.svg").read_text(), "draw it again"
    rows = re.findall(r'<rect class="(\w+)" x="(\d+)" y="(\d+)"', drawn.read_text())
    last = {top: (kind, left) for kind, left, top in rows}
    assert [kind for kind, _ in last.values()] == ["no"] * 7 + ["yes"], "only the last one is done"
    assert len({top for kind, left, top in rows if left == "246" and kind == "no"}) == 3, "three not drawn"
    for line in printed.splitlines()[1:]:
        _, _, foretold, measured, _ = (float(cell.rstrip("%")) for cell in line.split())
        assert abs(foretold - measured) < 5, "the page says that they agree"


@pytest.mark.slow
def test_the_mistakes(run) -> None:
    printed = run(EXPERIMENT, "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == tables()[0], f"copy this into the page:\n{printed}"
    told = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:]}
    right, mixed = told["(none)"], told["any-name-any-arguments"]
    assert right[0] == mixed[0] == "0" and right[4] == "3" < mixed[4], "drawn, and then refused"


def test_the_predictions() -> None:
    first, third = 1 - 0.9**21, 1 - (1 - 0.1**3) ** 21
    assert f"1 - 0.9^21 = **{first:.0%}**".replace("%", " %") in PAGE
    assert f"1 - 0.999^21 = **{third:.1%}**".replace("%", " %") in PAGE
    whole = sum(1000 + 300 * step for step in range(30))
    new = 1000 + 29 * 300
    assert f"**{whole:,}**" in PAGE and f"**{new:,}**" in PAGE
    assert 16 < whole / new < 17, "a sixteenth"
    assert 18 < 2000 / 110 < 19 and "110 tokens a step" in PAGE
