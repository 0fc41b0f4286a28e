"""Chapter 3.3: tables are what the experiment prints, answers are computed, what is said of them is so."""

from __future__ import annotations

from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of, tables_of
from tiny_llm.config import ModelConfig, Quantization
from tiny_llm.models.footprint import read_bytes
from tiny_llm.weights.names import config_of

PAGE, TABLES = page_of("3.3"), tables_of("3.3")

EXPERIMENT = "book/experiments/experts.py"


def test_the_predictions() -> None:
    config = ModelConfig.from_hf(config_of("qwen3-30b-a3b"))
    assert config.experts is not None
    N, k, width = config.experts.count, config.experts.per_token, config.experts.width
    assert (
        f"{N} experts in each of {config.num_layers} layers" in page_of("3.3") and f"a token has {k}" in PAGE
    )
    stacks = config.num_layers * N * 3 * config.hidden_size * width * 4.5 / 8
    read = [read_bytes(config, 2, 2, Quantization(4, 64), tokens=tokens) for tokens in (1, 16)]
    rest = read[0] - stacks * k / N
    assert f"take\n{stacks / 1e9:.1f} GB" in PAGE and f"takes {rest / 1e9:.2f} GB" in PAGE
    assert f"{stacks * k / N / 1e9:.2f} GB, in all **{read[0] / 1e9:.2f} GB**" in PAGE
    missed = (1 - k / N) ** 16
    assert f"= {missed:.0%}".replace("%", " %") in PAGE and f"{1 - missed:.0%}".replace("%", " %") in PAGE
    assert f"**{read[1] / 1e9:.1f} GB**" in PAGE
    idle = N * (1 - k / N) ** 64
    assert f"= **{idle:.0f}** get none. 64 x {k} = {64 * k} rows for {N - round(idle)} experts" in page_of(
        "3.3"
    )
    assert f"are **{64 * k / (N - idle):.0f}** each" in PAGE and N // k == 16


@pytest.mark.slow
def test_the_table_and_the_picture(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[1], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/experts.svg").read_text(), "draw it again"
    assert ">0: 10<" in drawn.read_text(), "the page says that expert 0 has ten rows"
    rows = [[float(part.replace(",", "")) for part in line.split()] for line in printed.splitlines()[2:]]
    busiest = rows[-1][-1]
    assert f"{busiest:.0f} of 1,024" in PAGE and rows[1][3] == 28, "4 tokens meet 28"
    assert rows[2][2] / rows[4][2] == pytest.approx(10, abs=0.5), "ten times what it will at 256"


@pytest.mark.slow
def test_the_mistakes(run) -> None:
    printed = run(EXPERIMENT, "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == TABLES[0], f"copy this into the page:\n{printed}"
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:]}
    assert all(row[0] == "0.0%" for row in rows.values()), "alone, every one of them is right"
    assert set(rows["(none)"]) == {"0.0%"} and rows["softmax-of-the-chosen"][1] == "0.0%"
