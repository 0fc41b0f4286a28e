"""How a step's parts compare before anything is measured: by operations and bytes, and never too cheap."""

from __future__ import annotations

import pytest

from tiny_llm.config import ModelConfig
from tiny_llm.models.cost import SLOW_PAIRS, step_costs
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
