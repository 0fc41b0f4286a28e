"""How a step's parts compare before anything is measured: by operations and bytes, and never too cheap.

What families have of their own counts, too: windows, an MLP without a gate, experts.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from tiny_llm.config import ModelConfig
from tiny_llm.models.cost import SLOW_PAIRS, attention_flops, matrix_flops, step_costs, step_of
from tiny_llm.models.registry import expected_tensors
from tiny_llm.weights.names import config_of

NAMES = ("qwen2-0.5b", "qwen2-7b", "qwen3-0.6b", "llama-3-8b")


@pytest.mark.parametrize("name", NAMES)
def test_a_token_is_taken_to_cost_what_reading_the_weights_does(name: str) -> None:
    config = ModelConfig.from_hf(config_of(name))
    costs = step_costs(config, weights=1_000_000, kv_token=10)
    assert costs.step == costs.chunk == 1_000_000
    assert costs.chunk < costs.decode < 1.6 * costs.chunk, "a decode's row goes through the head too"
    assert costs.decode_context > 10, "bytes of keys and values, and operations on them"


def test_context_weighs_as_its_operations_do() -> None:
    config = ModelConfig.from_hf(config_of("qwen2-0.5b"))
    costs = step_costs(config, weights=10**6, kv_token=0)
    layer = 2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864
    share = 2 * 14 * 64 / layer  # two multiplications a head dim and pair, one a weight
    assert costs.decode_context / costs.chunk == pytest.approx(share)
    assert costs.chunk_context == pytest.approx(SLOW_PAIRS * costs.decode_context)


@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 9), (3, 4), (100, 3), (6, 1), (7, 1)])
def test_what_a_window_hides_costs_nothing(start: int, tokens: int) -> None:
    config = replace(ModelConfig.from_hf(config_of("qwen2-0.5b")), num_layers=3, windows=(7, 0, 7))
    rows = range(start, start + tokens)
    seen = sum(min(row + 1, window or row + 1) for row in rows for window in config.windows)
    assert attention_flops(config, start, tokens) == 4 * config.num_heads * config.head_dim * seen
    read = step_of(config, 0, 30, start=start, tokens=tokens).attention.bytes
    firsts = [max(0, start - window + 1) if window else 0 for window in config.windows]
    assert read == sum(10 * (start + tokens - first) for first in firsts)
    assert step_costs(config, 1, 1).windows == ((7, 2 / 3),)


@pytest.mark.parametrize("name", ["gpt2", "qwen3-30b-a3b"])
def test_a_token_costs_the_entries_that_it_meets(name: str) -> None:
    config = ModelConfig.from_hf(config_of(name))
    shapes = expected_tensors(config).items()
    met = sum(prod(shape) for name, shape in shapes if ".layers." in name and len(shape) == 2)
    if facts := config.experts:
        stacks = sum(prod(shape) for name, shape in shapes if ".layers." in name and len(shape) == 3)
        met += stacks * facts.per_token // facts.count
    assert matrix_flops(config, 1, 0) == 2 * met
