"""Week 1 from 1.2 on: tables are what experiments print, predictions are computed, symptoms are as told."""

from __future__ import annotations

import math
import re
from itertools import islice
from pathlib import Path

import mlx.core as mx
import pytest

from book.course.manifest import ROOT, read_manifest
from tests.course.conftest import page_of
from tiny_llm.config import ModelConfig
from tiny_llm.data import Batch, KVCache
from tiny_llm.decoding.generate import generate_without_cache
from tiny_llm.decoding.stop import find_stop, open_length
from tiny_llm.models.decoder import Decoder, DecoderLayer
from tiny_llm.ops.attention import causal_mask
from tiny_llm.ops.rope import rope, rope_frequencies
from tiny_llm.sampling.logprobs import log_probabilities
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.weights.names import config_of

pytestmark = pytest.mark.slow

RECALL = "The password of the red door is zimbro. Which password opens the red door?"
EXPERIMENTS = {
    "1.2": "rope",
    "1.3": "groups",
    "1.4": "mlp",
    "1.5": "model",
    "1.6": "generate",
    "1.7": "sampling",
}


def close(got: str, expected: str) -> bool:
    """The same text, and fractions that differ by at most 0.2: another machine rounds otherwise."""
    number = r"\d+\.\d+"
    same = re.sub(number, "", got) == re.sub(number, "", expected)
    pairs = zip(re.findall(number, got), re.findall(number, expected), strict=True) if same else []
    return same and all(abs(float(a) - float(b)) <= 0.2 for a, b in pairs)


@pytest.mark.parametrize("number", EXPERIMENTS)
def test_the_experiments_print_what_the_pages_show(run, tmp_path: Path, number: str) -> None:
    name, drawn = EXPERIMENTS[number], tmp_path / "drawn.svg"
    done = run(f"book/experiments/{name}.py", "--svg", drawn, PYTHONPATH=ROOT)
    tables = re.findall(r"^```text\n(.*?)^```$", page_of(number), re.S | re.M)
    assert len(tables) == 1 and close(done.stdout, tables[0]), done.stdout + done.stderr
    svg = (ROOT / "book" / "docs" / "img" / f"{name}.svg").read_text(encoding="utf-8")
    assert close(drawn.read_text(encoding="utf-8"), svg), f"draw it again: book/experiments/{name}.py --svg"


@pytest.mark.parametrize(
    ("number", "mutant", "said"),
    [
        ("1.2", "turned-backwards", "The password is ."),
        ("1.2", "angles-in-half-precision", "The password of the red door is zimbro."),
        ("1.2", "scaling-ignored", "The password of the red door is zimbro."),
        ("1.3", "groups-unfolded-wrongly", "The password of the small dog is pedo."),
        ("1.3", "sees-one-ahead", "The password of the red door is zimbro."),
        ("1.3", "strangers-seen", "The password of the red door is zimbro."),
        ("1.4", "gate-and-up-swapped", "use, Lenat a."),
        ("1.4", "bias-forgotten", "The password of the red door is zimbro."),
        ("1.5", "last-mlp-lost", "The password of the red door is ziafro."),
        ("1.5", "one-norm-for-both", "The of the is  is 12"),
        ("1.5", "attention-not-added", "4" * 24),
        ("1.5", "last-norm-forgotten", "The password of the red door is zimbro."),
    ],
)
def test_the_symptoms_are_as_told(run, book, number: str, mutant: str, said: str) -> None:
    book.add_mutant(next(m for m in read_manifest()[number].mutants if m.name == mutant))
    told = run("main.py", "generate", "--prompt", RECALL, "--max-tokens", "24", "--course", book.folder)
    assert told.stdout.strip() == said, told.stderr


def test_the_predictions_of_1_2() -> None:
    slowest = rope_frequencies(64, 10_000.0)[-1].item()
    assert f"**{2 * math.pi / slowest:,.0f} tokens**" in page_of("1.2")
    assert f"becomes **{mx.array(1001.0).astype(mx.bfloat16).item():.0f}**" in page_of("1.2")


def test_what_1_2_says_of_lengths() -> None:
    x = mx.random.normal((3, 2, 8), key=mx.random.key(0))
    turned = rope(x, mx.array([0, 5, 900]), rope_frequencies(8, 10_000.0))
    pairs = [mx.square(a[..., :4]) + mx.square(a[..., 4:]) for a in (x, turned)]
    assert mx.allclose(*pairs, atol=1e-5).item()


def test_the_predictions_of_1_3() -> None:
    config = ModelConfig.from_hf(config_of("qwen2-0.5b"))
    keys = mx.zeros((config.num_layers, config.num_kv_heads, config.head_dim), mx.bfloat16)
    assert f"**{2 * keys.nbytes:,}** bytes" in page_of("1.3")
    masked = mx.sum(mx.isinf(causal_mask(3, 8, offset=5))).item()
    assert f"**{masked} scores**" in page_of("1.3")


def test_the_predictions_of_1_4() -> None:
    shapes = DecoderLayer.shapes(ModelConfig.from_hf(config_of("qwen2-0.5b")))
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    part = sum(size for name, size in sizes.items() if name.startswith("mlp.")) / sum(sizes.values())
    assert f"**{100 * part:.0f} %**" in page_of("1.4")
    squares = mx.square(mx.arange(1000).astype(mx.float16)).tolist()
    assert f"**{squares.index(math.inf)}** squared" in page_of("1.4")


def test_the_predictions_of_1_5() -> None:
    with (ROOT / "tiny_llm" / "demo" / "model.safetensors").open("rb") as file:
        begins = file.read(8)
    assert f"`{begins.hex(' ')}`" in page_of("1.5")
    assert f"**{int.from_bytes(begins, 'little'):,}** bytes" in page_of("1.5")
    tensors = Decoder.shapes(ModelConfig.from_hf(config_of("qwen2-0.5b")))
    assert f"**{len(tensors)} tensors**" in page_of("1.5")


@pytest.mark.parametrize(
    ("mutant", "said"),
    [
        ("head-always-wanted", "missing: lm_head.weight [2048, 256]"),
        ("length-not-counted", "but it has 10498568 data bytes"),
    ],
)
def test_what_1_5_refuses(run, book, mutant: str, said: str) -> None:
    book.add_mutant(next(m for m in read_manifest()["1.5"].mutants if m.name == mutant))
    told = run("main.py", "generate", "--prompt", RECALL, "--course", book.folder)
    assert told.returncode == 2 and said in told.stderr and said in page_of("1.5")


def test_the_predictions_of_1_7() -> None:
    cold = mx.exp(log_probabilities(mx.array([[2.0, 1.0, 0.0]]) / 0.5))[0, 0].item()
    assert f"**{100 * cold:.0f} %**" in page_of("1.7")
    long_tail = mx.concatenate([mx.array([10.0]), mx.zeros(151_935)])[None]
    assert f"**{100 * mx.exp(log_probabilities(long_tail))[0, 0].item():.0f} %**" in page_of("1.7")


@pytest.mark.parametrize(
    ("mutant", "said"),
    [("crossing-token-dropped", "!ant!-!! gives! by zero"), ("temperature-upside-down", "Once there was")],
)
def test_the_symptoms_of_1_7(run, book, mutant: str, said: str) -> None:
    book.add_mutant(next(m for m in read_manifest()["1.7"].mutants if m.name == mutant))
    asked = ("--prompt", "Tell me a short story about a fox.", "--max-tokens", "12", "--seed", "1")
    drawn = ("--temperature", "0.8", "--top-p", "0.9", "--course", book.folder)
    assert run("main.py", "generate", *asked, *drawn).stdout.startswith(said)


def test_the_predictions_of_1_6() -> None:
    rows = []

    def counting(batch: Batch, _: KVCache) -> mx.array:
        rows.append(batch.tokens.size)
        return mx.zeros((1, 4))

    assert len(list(islice(generate_without_cache(counting, [0] * 100, SamplingParams()), 50))) == 50
    assert f"**{sum(rows):,} rows**" in page_of("1.6")
    assert f"**{open_length('a##', ['###'])}**" in page_of("1.6")
    assert find_stop("a long stop", ["long stop", "on"]) == "a long stop".find("on")


@pytest.mark.parametrize(("mutant", "said"), [("nothing-held", "48 + 35 = 83"), (None, "48 + 35")])
def test_the_symptoms_of_1_6(run, book, mutant: str | None, said: str) -> None:
    book.folder.mkdir()
    for it in read_manifest()["1.6"].mutants:
        if it.name == mutant:
            book.add_mutant(it)
    asked = ("--prompt", "What is 48 + 35?", "--max-tokens", "16", "--stop", "= 83")
    assert run("main.py", "generate", *asked, "--course", book.folder).stdout.strip() == said
