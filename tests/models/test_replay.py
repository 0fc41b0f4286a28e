"""What a GPU's step plays again is what the model does."""

from __future__ import annotations

from array import array

import mlx.core as mx
import pytest

from tiny_llm.data import Plan, PlanItem
from tiny_llm.engine.batch import build_batch
from tiny_llm.kv.paged import PagedCache
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.models.decoder import Decoder
from tiny_llm.models.loading import load_model
from tiny_llm.models.registry import Model
from tiny_llm.models.replay import MOST_TOKENS, Replay, played
from tiny_llm.ops.backend import use
from tiny_llm.ops.kv_pool import KvFormat
from tiny_llm.weights import names

STEPS = [(0, 3), (3, 1), (4, 1), (5, MOST_TOKENS + 1)]  # first position, tokens


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """Three layers with all that a family may have: norms of heads, biases."""
    facts = {
        **names.config_of("qwen3-0.6b"),
        **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50, "attention_bias": True},
    }
    monkeypatch.setattr("tiny_llm.models.checkpoint.config_of", lambda _: facts)
    with use("mlx"):
        made = load_model(DummyCheckpoint("qwen3-0.6b"), dtype="float32", quantize=4)
    assert isinstance(made, Decoder)
    return made


def logits_of(model: Model) -> list[mx.array]:
    cache = PagedCache(KvFormat.of(model.config, 16, mx.float32), max_blocks=5)
    outs = []
    for start, count in STEPS:
        item = PlanItem(
            0, array("i", [p % 50 for p in range(start, start + count)]), start, array("i", range(5)), count
        )
        plan = Plan([item], 5, [], [], [])
        cache.prepare(plan)
        outs.append(model(build_batch(plan, 16), cache))
    return outs


def test_the_same_logits_bit_for_bit(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU MLX would call a C++ compiler for what it keeps: here it keeps nothing."""
    monkeypatch.setattr(mx, "compile", lambda function: function)
    with use("mlx"):
        for got, expected in zip(logits_of(Replay(model)), logits_of(model), strict=True):
            assert mx.array_equal(got, expected).item() and mx.isfinite(got).all().item()


def test_it_is_played_where_a_gpu_waits(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with use("mlx"):
        assert played(model) is model, "a CPU"
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        assert isinstance(played(model), Replay)
    for other in ("ref", "metalsim"):
        monkeypatch.setattr("tiny_llm.ops.backend.choose", lambda name: name)
        with use(other):
            assert played(model) is model, other
