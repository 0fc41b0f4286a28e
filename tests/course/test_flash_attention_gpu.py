"""Chapter 2.6's page: its table and picture are what the experiment makes, and predictions are computed."""

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

PAGE = page_of("2.6")
EXPERIMENT = "book/experiments/flash_attention_gpu.py"


def test_the_predictions() -> None:
    rows, heads, tile = 5, 7, 16
    tiles = -(-rows * heads // tile)
    assert f"**{tiles}** tiles have {tiles * tile} places" in PAGE
    assert (
        f"{tiles * tile - rows * heads} of these, **{1 - rows * heads / (tiles * tile):.0%}**"
        in PAGE.replace(" %", "%")
    )
    row = {lane for lane in range(32) if (lane // 4 & 4) + lane // 2 % 4 == 2}
    assert row == {lane ^ bits for lane in (4,) for bits in (0, 1, 8, 9)} == {4, 5, 12, 13}


def test_the_table_and_the_picture(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    (table,) = re.findall(r"^```text\n(.*?)^```$", PAGE, re.S | re.M)
    assert printed == table, f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/flash_attention_gpu.svg").read_text(), "draw it again"
