"""Chapter 3.4: bytes are those that come, tables are what the experiment prints, the mistakes as told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of, tables_of
from tiny_llm.config import ModelConfig
from tiny_llm.models.cost import matrix_flops
from tiny_llm.planning.simulation.costs import DEVICES, costs_of
from tiny_llm.weights.names import config_of

PAGE, TABLES = page_of("3.4"), tables_of("3.4")

EXPERIMENT = "book/experiments/apart.py"


def test_the_predictions() -> None:
    blocks, more, full = -(-599 // 16), -(-799 // 16), 599 // 16
    assert f"599 tokens are **{blocks}** blocks, the last with {599 - 16 * full} tokens" in PAGE
    assert (
        f"Of 799 there are {more}. The {full} full ones" in page_of("3.4")
        and f"so **{more - full}** come" in PAGE
    )
    costs, device = costs_of("qwen2-7b", "a100-40gb"), DEVICES["a100-40gb"]
    flops = matrix_flops(ModelConfig.from_hf(config_of("qwen2-7b")), 1, 0)
    assert device.flops_s == 312e12 and round(flops / 1e9) == 13
    assert f"{costs.kv_token_bytes:,} bytes" in PAGE
    rate = 12_000 * costs.kv_token_bytes
    assert round(156e12 / 13e9) == 12_000 and f"**{rate / 1e6:.0f} MB/s**" in PAGE
    assert round(rate / 125e6) == 6, "a wire of 1 Gb/s is six times too slow"


@pytest.mark.slow
def test_bytes_are_those_that_are_foretold(run, tmp_path: Path) -> None:
    """By two real processes; and the picture."""
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[1], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/apart.svg").read_text(), "draw it again"
    rows = [re.findall(r"[\d,]+", line)[-5:] for line in printed.splitlines()[3:]]
    assert all(foretold == counted for *_, foretold, counted in rows)
    assert [row[2] for row in rows[:3]] == ["38", "0", "13"], "as the page's predictions have it"
    for line in TABLES[2].splitlines()[1:]:
        tokens, *_, sent = re.findall(r"[\d.,]+", line)
        assert int(sent.replace(",", "")) == -(-(int(tokens) - 1) // 16) * 16 * 3072


@pytest.mark.slow
def test_the_mistakes(run) -> None:
    printed = run(EXPERIMENT, "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == TABLES[0], f"copy this into the page:\n{printed}"
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:]}
    sent = {name: int(row[0].replace(",", "")) for name, row in rows.items()}
    assert 1.4 < sent["from-the-beginning"] / sent["(none)"] < 1.6, "half as much again"
    assert rows["from-the-beginning"][1:] == rows["(none)"][1:] and rows["(none)"][2:] == ["0", "0"]
    assert float(rows["over-a-gap"][1][:-1]) > float(rows["(none)"][1][:-1]) and rows["over-a-gap"][2] != "0"
