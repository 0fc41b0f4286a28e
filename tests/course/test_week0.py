"""Week 0: tables are what the experiments print, predictions are computed, symptoms are as told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_llm.config import Quantization
from tiny_llm.course.manifest import ROOT, read_manifest
from tiny_llm.course.workbook import Workbook
from tiny_llm.models.footprint import (
    kv_token_bytes,
    parameter_count,
    tensor_bytes,
    training_bytes,
    weights_bytes,
)
from tiny_llm.ops.backend import works
from tiny_llm.planning.memory import find_config


def text_of(number: str) -> str:
    """A chapter's page."""
    return (ROOT / "book" / "docs" / read_manifest()[number].page).read_text(encoding="utf-8")


def test_the_experiment_of_0_2_prints_what_the_page_shows(run, tmp_path: Path) -> None:
    drawn = tmp_path / "memory.svg"
    printed = run("book/experiments/memory.py", "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert f"```text\n{printed}```" in text_of("0.2"), "make book-experiments"
    svg = (ROOT / "book" / "docs" / "img" / "memory.svg").read_text(encoding="utf-8")
    assert drawn.read_text(encoding="utf-8") == svg, "make book-experiments"


def test_the_predictions_of_0_2() -> None:
    text, llama = text_of("0.2"), find_config("llama-3-8b")
    kv, weights = kv_token_bytes(llama, 2), weights_bytes(llama, 2, 2)
    assert f"**{kv // 1024} KiB**" in text and f"**{weights // kv:,}** tokens" in text
    assert weights // kv // 8192 + 1 == 15, "fifteen conversations"
    serve = tensor_bytes((64,), 2, Quantization(4, 64)) / 64
    train = sum(training_bytes(llama, 0)) / parameter_count(llama)
    assert f"**{train / serve:.0f} times**" in text


def test_the_symptoms_of_0_2_are_as_told(run, book) -> None:
    asked = (
        "memory --model llama-3-8b --quantize 4 --batch 8 --context 8192 --memory 16GB --json --backend cpu"
    )
    if not works():
        pytest.skip("the CPU kernels were not built: no C++ compiler")
    command = ["main.py", *asked.split()]
    ours = json.loads(run(*command).stdout)
    told = {}
    for name in ("keys-only", "query-heads"):
        mutant = next(m for m in read_manifest()["0.2"].mutants if m.name == name)
        other = Workbook(book.folder / name)
        other.add_mutant(mutant)
        told[name] = json.loads(run(*command, "--course", other.folder).stdout)
    assert (ours["fits"], ours["largest_batch"]) == (False, 7)
    assert (told["keys-only"]["fits"], told["keys-only"]["largest_batch"]) == (True, 15)
    assert told["keys-only"]["kv_token"] * 2 == ours["kv_token"]
    assert told["query-heads"]["kv_token"] == 4 * ours["kv_token"]
