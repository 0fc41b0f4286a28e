"""Chapter 3.5: tables are what the experiment prints, answers are computed, what is said of them is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of, tables_of
from tiny_llm.config import ModelConfig
from tiny_llm.data import Sequence
from tiny_llm.models.cost import matrix_flops
from tiny_llm.planning.simulation.costs import DEVICES, costs_of
from tiny_llm.scheduler.places import rank_of
from tiny_llm.weights.names import config_of

PAGE, TABLES = page_of("3.5"), tables_of("3.5")

EXPERIMENT = "book/experiments/scheduler.py"


def numbers(line: str) -> list[float]:
    """The numbers at the end of a table's row."""
    found = re.findall(r"(?<= )[\d,]+(?:\.\d+)?(?= |$)", line.partition("  ")[2])
    return [float(number.replace(",", "")) for number in found]


def test_the_predictions() -> None:
    asked = {"A": (0, 0), "B": (4, 1), "C": (12, 1), "D": (9, -1)}
    ranks = {}
    for number, (name, (arrival, priority)) in enumerate(asked.items()):
        ranks[name] = rank_of(Sequence(number, [1], arrival=arrival, priority=priority), 10.0)  # type: ignore[arg-type]
    assert "at {}, {}, {} and {} s".format(*(int(rank[0]) for rank in ranks.values())) in PAGE
    assert f"**{', '.join(sorted(ranks, key=lambda name: ranks[name]))}**" in PAGE
    costs, device = costs_of("qwen2-7b", "a100-40gb"), DEVICES["a100-40gb"]
    moved = 2000 * costs.kv_token_bytes
    assert f"2,000 x {costs.kv_token_bytes:,} bytes are {moved / 1e6:.1f} MB" in PAGE
    there_and_back, again = 2 * moved / 20e9 * 1e3, 2000 * 13e9 / (device.flops_s / 2) * 1e3
    assert f"**{there_and_back:.1f} ms**" in PAGE and f"**{again:.0f} ms**" in PAGE
    assert round(again / there_and_back) == 15 and "fifteen times" in PAGE
    config = ModelConfig.from_hf(config_of("qwen2-7b"))
    assert f"and {matrix_flops(config, 1, 0) / 1e9:.0f} GFLOP a token" in PAGE


@pytest.mark.slow
def test_the_picture(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT)
    assert drawn.read_text() == (ROOT / "book/docs/img/scheduler.svg").read_text(), "draw it again"
    assert len(set(re.findall(r' y="(\d+)" width', drawn.read_text()))) == 60, "sixty requests"


@pytest.mark.slow
def test_the_mistakes(run) -> None:
    printed = run(EXPERIMENT, "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == TABLES[0], f"copy this into the page:\n{printed}"
    rows = {line.split()[0]: numbers(line) for line in printed.splitlines()[1:]}
    right, small, spared = rows["(none)"], rows["small-ones-overtake"], rows["no-block-spared"]
    assert small[0] > 2 * right[0], "an urgent one waits for longer if small ones may pass"
    assert 1.8 < spared[2] / right[2] < 2.2, "the page says twice as many"
    assert rows["never-old-enough"][1] > right[1] and rows["upside-down"][0] > rows["upside-down"][1]


@pytest.mark.slow
def test_the_table_of_the_trace(run, shared_data: Path) -> None:
    trace = shared_data / "traces" / "azure_2023_conv.csv"
    if not trace.is_file():
        pytest.skip(f"no trace at {trace}")
    printed = run(EXPERIMENT, "--trace", trace, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[1], f"copy this into the page:\n{printed}"
    first, _, aged, never = (numbers(line) for line in printed.splitlines()[2:])
    assert aged[5] - first[5] < 10, "others wait longer by less than a level"
    assert round(never[5] / first[5]) == 2, "without ageing the longest wait nearly doubles"
    assert aged[0] / first[0] < 0.3 and 0.7 < aged[2] / first[2] < 0.8, "a quarter; and by only a quarter"
