"""Operations are those of the model's own matrices and of pairs of tokens; the roof is where it is due."""

from __future__ import annotations

import time
from math import prod

import pytest

from tiny_llm.config import ModelConfig
from tiny_llm.models.cost import Work, attention_flops, least_seconds, matrix_flops, step_of
from tiny_llm.models.registry import expected_tensors
from tiny_llm.weights.names import config_of

pytestmark = pytest.mark.chapter("0.3")

NAMES = ("qwen2-0.5b", "qwen2-7b", "qwen3-0.6b", "llama-3-8b", "llama-3.2-1b")
ALL = {name: ModelConfig.from_hf(config_of(name)) for name in NAMES}


def layer_entries(config: ModelConfig) -> int:
    """Entries of all matrices in layers, as the model's own list of tensors has them."""
    shapes = expected_tensors(config)
    return sum(prod(shape) for name, shape in shapes.items() if "layers" in name and len(shape) == 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (512, 1), (16, 16)])
def test_each_entry_takes_two_operations_a_token(name: str, tokens: int, rows: int) -> None:
    config = ALL[name]
    layers, head = layer_entries(config), config.vocab_size * config.hidden_size
    expected = 2 * tokens * layers + 2 * rows * head
    known = {
        tokens * layers + 2 * rows * head: "a multiplication and an addition are two operations",
        2 * tokens * (layers + head): "logits are made of rows only",
        2 * tokens * layers: "the head is missing",
    }
    got = matrix_flops(config, tokens, rows)
    assert got == expected, known.get(got, f"{got / expected:.3f} of what is expected")


@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 5), (7, 1), (100, 3)])
def test_attention_is_counted_pair_by_pair(start: int, tokens: int) -> None:
    config = ALL["qwen2-0.5b"]
    pairs = sum(position + 1 for position in range(start, start + tokens))
    pair = 4 * config.num_layers * config.num_heads * config.head_dim
    got = attention_flops(config, start, tokens)
    known = {
        tokens * (start + tokens): "tokens look at those after them",
        pairs - tokens: "a token looks at itself too",
        pairs / 2: "scores or values are missing",
    }
    assert type(got) is int, "operations are whole numbers"
    assert got == pair * pairs, known.get(got / pair, f"{got / pair} pairs, expected {pairs}")


@pytest.mark.parametrize(("start", "tokens"), [(0, 2_000_000), (10**9 + 1, 2_000_000), (3, 4), (10**17, 3)])
def test_pairs_are_not_counted_one_by_one(start: int, tokens: int) -> None:
    config = ALL["qwen3-0.6b"]
    began = time.process_time()
    got = attention_flops(config, start, tokens)
    assert time.process_time() - began < 0.05, "a million pairs are one sum"
    positions = (2 * start + tokens + 1) * tokens // 2  # start + 1 and on
    assert got == 4 * 28 * 16 * 128 * positions, "exactly, and heads are as wide as the config says"


def test_chunks_add_up_to_the_whole() -> None:
    config = ALL["llama-3-8b"]
    whole = attention_flops(config, 0, 100)
    assert attention_flops(config, 0, 60) + attention_flops(config, 60, 40) == whole


def test_a_batch_reads_the_weights_once() -> None:
    config = ALL["qwen2-0.5b"]
    one = step_of(config, 1000, 10, start=99, tokens=1)
    many = step_of(config, 1000, 10, start=99, tokens=1, sequences=8)
    assert one.matrices.bytes == many.matrices.bytes == 1000, "for all sequences together"
    assert one.attention.bytes == 10 * 100 and many.attention.bytes == 8 * 10 * 100, "each its own context"
    assert many.matrices.flops == matrix_flops(config, 8, 8) == 8 * one.matrices.flops
    assert many.attention.flops == 8 * attention_flops(config, 99, 1) == 8 * one.attention.flops


def test_a_prompt_makes_one_row_of_logits() -> None:
    config = ALL["qwen2-0.5b"]
    prompt = step_of(config, 1000, 10, start=0, tokens=50, sequences=2)
    assert prompt.matrices.flops == matrix_flops(config, 100, 2)


def test_each_prompt_of_a_batch_looks_at_itself() -> None:
    config = ALL["qwen2-0.5b"]
    prompt = step_of(config, 1000, 10, start=30, tokens=50, sequences=2)
    assert prompt.attention.flops == 2 * attention_flops(config, 30, 50)
    assert prompt.attention.bytes == 2 * 80 * 10, "new tokens are read, too"


def test_the_roof_has_two_sides() -> None:
    flops_s, bytes_s = 700.0, 35.0
    assert least_seconds(Work(700, 1), flops_s, bytes_s) == 1, "bound by operations"
    assert least_seconds(Work(1, 70), flops_s, bytes_s) == 2, "bound by bytes"
    assert least_seconds(Work(700, 35), flops_s, bytes_s) == 1, "in the corner both take as long, together"
    assert least_seconds(Work(0, 70), flops_s, bytes_s) == 2, "what only moves takes its time, too"
    assert least_seconds(Work(7, 1), 7e12, 1e13) == 1e-12
    assert Work(700, 35).intensity == flops_s / bytes_s
