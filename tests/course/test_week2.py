"""Chapters 0.1, 2.1 to 2.3: tables are what the experiments print, answers are computed, symptoms as told."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest

from book.course.manifest import ROOT, read_manifest
from tests.course.conftest import page_of, tables_of
from tiny_llm.config import Quantization
from tiny_llm.tokenizer.bpe import BPE
from tiny_llm.tokenizer.detokenizer import byte_alphabet
from tiny_llm.weights.quantize import quantize_matrix

pytestmark = pytest.mark.slow

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


def frame(table: str) -> str:
    """A table without its numbers."""
    return re.sub(r"[\d.]+", "#", re.sub(r" +", " ", table))


def test_the_predictions_of_2_3() -> None:
    rows, size = 896, 494_032_768
    matrix = quantize_matrix(mx.random.normal((rows, 896)).astype(mx.bfloat16), Quantization(4, 64))
    bits = 8 * (matrix.packed.nbytes + matrix.scales.nbytes + matrix.biases.nbytes) / (rows * 896)
    megabytes = size * bits / 8 / 1e6
    assert f"**{megabytes:.0f} MB**" in page_of("2.3")
    assert f"**{28_000 / megabytes:.0f} tokens**" in page_of("2.3")
    assert f"**{896 + 2 * matrix.scales.shape[1]}**" in page_of("2.3")


def test_the_errors_of_2_3(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run("book/experiments/quantized_matmul.py", "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == tables_of("2.3")[0], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/quantized_matmul.svg").read_text(), "draw it again"


@needs_compiler
def test_the_speeds_of_2_3(run) -> None:
    done = run("book/experiments/quantized_matmul.py", "--speed", PYTHONPATH=ROOT)
    assert set(frame(done.stdout).splitlines()) <= set(frame(tables_of("2.3")[1]).splitlines()), done.stderr


@needs_compiler
def test_the_program_of_2_3_runs(tmp_path: Path) -> None:
    (program,) = re.findall(r"^```cpp\n(.*?)^```$", page_of("2.3"), re.S | re.M)
    (tmp_path / "page.cpp").write_text(program)
    subprocess.run(["c++", "-std=c++20", "page.cpp", "-o", "page"], cwd=tmp_path, check=True)
    subprocess.run([tmp_path / "page"], check=True)


@needs_compiler
@pytest.mark.parametrize(
    ("mutant", "bits", "right"),
    [("bias-forgotten", 4, False), ("highest-bits-first", 8, False), ("highest-bits-first", 4, True)],
)
def test_the_symptoms_of_2_3(run, book, mutant: str, bits: int, right: bool) -> None:
    book.add_mutant(next(m for m in read_manifest()["2.3"].mutants if m.name == mutant))
    asked = ("generate", "--prompt", "What is 48 + 35?", "--max-tokens", "12", "--quantize", bits)
    said = run("main.py", *asked, "--course", book.folder).stdout
    assert said and ("83" in said) == right, said


def test_the_predictions_of_2_1(run) -> None:
    printed = run("book/experiments/kv_cache.py", PYTHONPATH=ROOT).stdout
    assert frame(printed) == frame(tables_of("2.1")[1])
    rows, text = re.findall(r"[\d,]+ with", printed.splitlines()[0]), page_of("2.1")
    assert len(rows) == 2 and all(f"**{row.removesuffix(' with')}**" in text for row in rows)
    token = 2 * 24 * mx.zeros((1, 2, 64), dtype=mx.bfloat16).nbytes
    assert f"**{token:,}** bytes" in text and f"**{token * 4096 / 1e6:.0f} MB**" in text


def test_the_mistakes_of_2_1(run) -> None:
    """Which ones show; what exactly a broken model says may differ on another machine."""
    printed = run("book/experiments/kv_cache.py", "--mistakes", PYTHONPATH=ROOT).stdout
    found, told = (
        [(line[:24].strip(), line.endswith("48 + 35 = 83")) for line in text.splitlines()[1:]]
        for text in (printed, tables_of("2.1")[0])
    )
    assert found == told and len(found) == 7, printed


def test_the_predictions_of_2_2() -> None:
    text = page_of("2.2")
    first, second = (statistics.median(1 + 0.2 * call / 40 for call in part) for part in halves(40))
    assert f"**{second / first - 1:.1%}**".replace("%", " %") in text
    calls = [100] * 19 + [2100]
    assert f"**{statistics.mean(calls):.0f} ms**" in text and f"**{statistics.median(calls):.0f} ms**" in text


def halves(count: int) -> tuple[range, range]:
    """The first half of so many calls, and the second."""
    return range(count // 2), range(count // 2, count)


def test_the_tables_of_2_2(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run("book/experiments/measuring.py", "--svg", drawn, PYTHONPATH=ROOT).stdout
    (told,) = tables_of("2.2")
    assert frame(printed) == frame(told)
    assert printed.partition("\n\n")[2] == told.partition("\n\n")[2], "what is simulated is the same anywhere"
    assert drawn.read_text() == (ROOT / "book/docs/img/measuring.svg").read_text(), "draw it again"


def test_the_predictions_of_0_1() -> None:
    lengths, text = (10, 50, 500, 1000), page_of("0.1")
    whole = 1 - sum(lengths) / (4 * 1000)
    cuts = [at * lengths[at - 1] + (4 - at) * lengths[-1] for at in (1, 2, 3)]
    assert f"**{whole:.0%}**".replace("%", " %") in text
    assert f"**{1 - sum(lengths) / min(cuts):.0%}**".replace("%", " %") in text
    demo = BPE.from_json((ROOT / "tiny_llm" / "demo" / "tokenizer.json").read_text(encoding="utf-8"))
    english = BPE({token: i for i, token in enumerate(byte_alphabet())}, {}, {}, demo.split)
    assert f"**{len(english.encode('你' * 1000)):,}** tokens" in text


def test_the_tables_of_0_1(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run("book/experiments/bpe.py", "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == tables_of("0.1")[0], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/bpe.svg").read_text(), "draw it again"


def test_a_stream_that_reads_tokens_alone_is_well_in_english_only(run, book) -> None:
    book.add_mutant(next(m for m in read_manifest()["0.1"].mutants if m.name == "streamed-alone"))
    asked = ("generate", "--prompt", "What is 48 + 35?", "--max-tokens", "12")
    assert "83" in run("main.py", *asked, "--course", book.folder).stdout
