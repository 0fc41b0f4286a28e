"""Chapter 4.5: tables are what the experiment prints, answers are computed, the mistakes as told."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of, tables_of
from tiny_llm.config import ModelConfig
from tiny_llm.models.ranks import _divides, gathered_bytes, layer_lacks

PAGE, TABLES = page_of("4.5"), tables_of("4.5")

pytestmark = pytest.mark.slow
EXPERIMENT = "book/experiments/tensor_parallel.py"
SIZES = {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152_064}
SIZES |= {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}


def test_the_tables_of_4_5(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    told, shown = (one.split("\n\n") for one in (printed, TABLES[1]))
    assert told[0] == shown[0] and told[2] == shown[2], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/tensor_parallel.svg").read_text(), "draw it again"
    assert all(line.endswith("0 of 48,048") for line in told[0].splitlines()[1:])
    for line in told[1].splitlines()[1:]:  # rounding, which another machine does otherwise
        share, most = re.findall(r"([\d.]+)%|(\d+e-\d+|\d\.\d+)", line)[:2]
        assert float(share[0]) > 60 and float(most[1]) < 0.2
    bytes_ = [[int(cell.replace(",", "")) for cell in line.split()[-2:]] for line in told[2].splitlines()[1:]]
    assert all(1.6 <= round(ours / theirs, 1) <= 2.1 for ours, theirs in bytes_)


def test_the_mistakes_of_4_5(run) -> None:
    printed = run(EXPERIMENT, "--mistakes", PYTHONPATH=ROOT).stdout
    told, shown = ([line.split() for line in one.splitlines()] for one in (printed, TABLES[0]))
    assert [line[0] for line in told] == [line[0] for line in shown], f"copy this into the page:\n{printed}"
    assert printed.splitlines()[1].split(maxsplit=1)[1].split("  ")[0] == "the same"
    same = [["same" in part for part in (line[20:46], line[46:])] for line in printed.splitlines()[1:]]
    assert same == [["same" in p for p in (line[20:46], line[46:])] for line in TABLES[0].splitlines()[1:]]


def test_the_predictions_of_4_5() -> None:
    config = ModelConfig.from_hf(SIZES)
    able = ", ".join(str(size) for size in range(1, 29) if _divides(config, size))
    assert f"**{able}**" in PAGE
    lacking = layer_lacks(config, 18944, 2)
    assert f"= {2 * lacking:,} numbers" in page_of("4.5") and f"**{2 * 28 * lacking / 1e3:.0f} KB**" in PAGE
    assert f"that is {2 * 28 * lacking / 1.25e9 * 1e3:.1f} ms" in PAGE
    assert gathered_bytes(config, 2).gathers - 2 == 112 and f"are {112 * 0.3:.0f}." in PAGE
    assert not _divides(replace(config, num_kv_heads=4), 7)
