"""Week 0: tables are what the experiments print, predictions are computed, symptoms are as told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from book.course.manifest import ROOT, read_manifest
from book.course.workbook import Workbook
from tests.course.conftest import page_of
from tiny_llm.config import Quantization
from tiny_llm.models.cost import matrix_flops, step_of
from tiny_llm.models.footprint import (
    kv_token_bytes,
    parameter_count,
    tensor_bytes,
    training_bytes,
    weights_bytes,
)
from tiny_llm.ops.backend import works
from tiny_llm.planning.memory import find_config

pytestmark = pytest.mark.slow


def test_the_experiment_of_0_2_prints_what_the_page_shows(run, tmp_path: Path) -> None:
    drawn = tmp_path / "memory.svg"
    printed = run("book/experiments/memory.py", "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert f"```text\n{printed}```" in page_of("0.2"), "make book-experiments"
    svg = (ROOT / "book" / "docs" / "img" / "memory.svg").read_text(encoding="utf-8")
    assert drawn.read_text(encoding="utf-8") == svg, "make book-experiments"


def test_the_predictions_of_0_2() -> None:
    text, llama = page_of("0.2"), find_config("llama-3-8b")
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
    assert (told["keys-only"]["fits"], told["keys-only"]["largest_batch"]) == (True, 14)
    assert told["keys-only"]["kv_token"] * 2 == ours["kv_token"]
    assert told["query-heads"]["kv_token"] == 4 * ours["kv_token"]


def test_the_experiment_of_0_3_prints_what_the_page_shows(run, tmp_path: Path) -> None:
    drawn = tmp_path / "cost.svg"
    printed = run("book/experiments/cost.py", "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert f"```text\n{printed}```" in page_of("0.3"), "make book-experiments"
    svg = (ROOT / "book" / "docs" / "img" / "cost.svg").read_text(encoding="utf-8")
    assert drawn.read_text(encoding="utf-8") == svg, "make book-experiments"


def test_the_predictions_of_0_3() -> None:
    text, config = page_of("0.3"), find_config("qwen2-0.5b")
    weights = weights_bytes(config, 2, 4, Quantization(4, 64))
    assert f"**{35e9 / weights:.0f}** tokens a second" in text
    assert f"**{matrix_flops(config, 1, 1) / 1e9:.2f} GFLOP**" in text
    together = [step_of(config, weights, 0, start=0, tokens=1, sequences=n).matrices for n in range(1, 100)]
    shared = sum(1 for work in together if work.flops / 700e9 < work.bytes / 35e9)
    assert f"So **{shared}**" in text
    first, last = together[0], step_of(config, weights, 12288, start=0, tokens=512)
    far = (last.matrices.flops + last.attention.flops) / (last.matrices.bytes + last.attention.bytes)
    assert f"factor of {far / first.intensity / 10:.0f}0" in text


def test_the_symptoms_of_0_3_are_as_told(run, book) -> None:
    """On a machine of the page's speeds: a sum is felt at the corner, and weights for each end sharing."""
    ask = (
        "from tiny_llm.planning.speed import *; from tiny_llm.planning.memory import find_config\n"
        "m = Machine(35e9, 700e9, 200e9); c = find_config('qwen2-0.5b')\n"
        "print([predict(c, m, quantize=FORMAT, prompt=512, answer=2, batch=n).decode for n in (1, 6)])"
    )
    said = {"": json.loads(run("-c", ask).stdout)}
    for name in ("one-after-the-other", "weights-for-each"):
        other = Workbook(book.folder / name)
        other.add_mutant(next(m for m in read_manifest()["0.3"].mutants if m.name == name))
        said[name] = json.loads(run("-c", ask, TINY_LLM_COURSE=other.folder).stdout)
    right, added, each = said[""], said["one-after-the-other"], said["weights-for-each"]
    assert right[1] / right[0] > 5 and added[0] / right[0] > 0.8 and added[1] / right[1] < 0.6
    assert each[1] / each[0] < 1.2


def test_the_roofs_of_0_3_are_near() -> None:
    """As measured for the page; another machine's figures differ, and stay as near."""
    rows = re.findall(r"^qwen2-\S+ +512 .*$", page_of("0.3"), re.M)
    assert len(rows) == 2
    for row in rows:
        prefill_roof, prefill, decode_roof, decode = map(float, row.split()[-4:])
        assert 0.75 <= prefill / prefill_roof <= 1.25 and 0.75 <= decode / decode_roof <= 1.25, row
