"""What the models' tests share: the golden cases, a prompt as a batch, and the plainest greedy loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.data import Batch
from tiny_llm.kv.dense import DenseCache
from tiny_llm.models.registry import Model

CASES = (
    "qwen2_tied",
    "qwen2_untied_sharded",
    "qwen2_14_heads",
    "qwen3",
    "llama",
    "llama_linear",
    "llama_llama3",
    "llama_bias",
    "llama_odd",
    "mistral",
    "mistral_window",
    "qwen2_window",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "gpt2",
    "ernie4_5",
    "ernie4_5_moe",
    "phi3",
    "phi3_long",
    "smollm3",
    "olmo2",
    "granite",
    "gemma3",
    "qwen2_yarn",
)
MakeBatch = Callable[..., Batch]
Greedy = Callable[[Model, Sequence[int], int], list[int]]


def _batch(*sequences: Sequence[int], start: int = 0) -> Batch:
    """Whole sequences with logits wanted for every row; ``start`` is the first row's position."""
    starts = [0]
    for tokens in sequences:
        starts.append(starts[-1] + len(tokens))
    positions = [start + i for tokens in sequences for i in range(len(tokens))]
    tokens = [token for sequence in sequences for token in sequence]
    return Batch(mx.array(tokens), mx.array(positions), tuple(starts), mx.arange(starts[-1]))


@pytest.fixture(scope="session")
def cases() -> tuple[str, ...]:
    """The golden models that ``folder`` goes through."""
    return CASES


@pytest.fixture(scope="module", params=CASES)
def folder(golden: Path, request: pytest.FixtureRequest) -> Path:
    """Each golden model's folder in turn."""
    return golden / str(request.param)


@pytest.fixture(scope="session")
def make_batch() -> MakeBatch:
    """``make_batch([1, 2, 3], [4, 5], start=0)``."""
    return _batch


@pytest.fixture(scope="session")
def greedy() -> Greedy:
    """``greedy(model, prompt ids, count)``: the likeliest token, again and again, with a dense cache."""

    def generate(model: Model, prompt: Sequence[int], count: int) -> list[int]:
        cache, new, out = DenseCache(model.config.num_layers), list(prompt), []
        for _ in range(count):
            logits = model(_batch(new, start=cache.length), cache)
            new = [int(mx.argmax(logits[-1]).item())]
            out += new
        return out

    return generate
