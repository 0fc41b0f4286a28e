"""What bench measures is what it says: rows, steps and sequences are counted here by a model that watches."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import pytest

from tiny_llm.data import Batch, KVCache
from tiny_llm.engine.bench import Separate, Task, bench, measure
from tiny_llm.errors import ConfigError, RequestError
from tiny_llm.kv.dense import DenseCache
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.loading import load_dummy


class Watched:
    """A model of no layers that writes down the rows of each pass."""

    config = SimpleNamespace(
        vocab_size=7, num_layers=0, max_position_embeddings=100, quantization=None, dtype="float32"
    )

    def __init__(self) -> None:
        self.passes: list[tuple[tuple[int, ...], list[int]]] = []

    def __call__(self, batch: Batch, kv: KVCache) -> mx.array:
        self.passes.append((batch.query_start_loc, batch.positions.tolist()))
        return mx.zeros((batch.logit_rows.size, 7))


def test_one_sequence_is_prompt_then_tokens() -> None:
    model = Watched()
    speed = measure(model, Task("x", prompt_tokens=20, new_tokens=3, rounds=1))  # type: ignore[arg-type]
    round_ = [p for p in model.passes if p[1][0] == 0 and len(p[1]) == 20]
    assert len(round_) == 1, "the prompt goes through once a round"
    after = model.passes[model.passes.index(round_[0]) + 1 :]
    assert after[:2] == [((0, 1), [20]), ((0, 1), [21])]
    assert speed.prefill_tok_s > 0 and speed.decode_tok_s > 0
    assert speed.ttft_s == pytest.approx(20 / speed.prefill_tok_s)


def test_a_batch_steps_together() -> None:
    model = Watched()
    measure(model, Task("x", prompt_tokens=20, new_tokens=3, batch=2, rounds=2))  # type: ignore[arg-type]
    prompts = [i for i, p in enumerate(model.passes) if len(p[1]) == 20]
    assert len(prompts) == 4, "two prompts in each of two rounds"
    assert model.passes[prompts[1] + 1 : prompts[1] + 3] == [((0, 1, 2), [20, 20]), ((0, 1, 2), [21, 21])]


def test_sequences_of_a_batch_keep_their_own_past() -> None:
    """As NoCache says it of the whole sequences."""
    lengths, steps = (3, 5), 2
    keys = mx.random.split(mx.random.key(0), 3)
    q, k, v = (mx.random.normal((sum(lengths) + 4, 2, 8), key=key) for key in keys)
    caches = [DenseCache(1), DenseCache(1)]
    first = Batch(mx.arange(8), mx.arange(8), (0, 3, 8), mx.array([2, 7]))
    Separate(caches).attend(0, q[:8], k[:8], v[:8], first)
    for step in range(steps):
        rows = slice(8 + 2 * step, 10 + 2 * step)
        batch = Batch(mx.arange(2), mx.arange(2), (0, 1, 2), mx.arange(2))
        got = Separate(caches).attend(0, q[rows], k[rows], v[rows], batch)
    order = mx.array([0, 1, 2, 8, 10, 3, 4, 5, 6, 7, 9, 11])
    whole = Batch(order, order, (0, 5, 12), order)
    expected = NoCache().attend(0, q[order], k[order], v[order], whole)
    assert mx.allclose(got, expected[mx.array([4, 11])], atol=1e-5)


def test_the_row_says_what_was_run() -> None:
    row = bench(Task("demo", prompt_tokens=8, new_tokens=2, quantize=8, rounds=1), backend="ref")
    assert (row["model"], row["quantize"], row["backend"], row["isa"]) == ("demo", 8, "ref", None)
    assert row["threads"] is None
    assert isinstance(row["peak_memory_bytes"], int)
    for figure in ("prefill_tok_s", "decode_tok_s", "ttft_s", "load_s"):
        value = row[figure]
        assert isinstance(value, float) and value > 0, figure


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch", "rounds"])
def test_work_that_is_none(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is 0, but must be at least"):
        Task("demo", **{name: 0})  # type: ignore[arg-type]


def test_more_tokens_than_the_context() -> None:
    with pytest.raises(RequestError, match=r"are 1025 tokens, the context of demo is 1024\."):
        bench(Task("demo", prompt_tokens=1000, new_tokens=25))


def test_dummy_weights_are_of_short_names() -> None:
    with pytest.raises(ConfigError, match=r"no short name 'qwen2-0\.6b'.* Did you mean"):
        bench(Task("qwen2-0.6b", "dummy"))


def test_a_dummy_model_gives_finite_logits() -> None:
    model = load_dummy("qwen2-0.5b", quantize=4)
    one = mx.zeros(1, mx.int32)
    logits = model(Batch(one, one, (0, 1), one), NoCache())
    assert logits.shape == (1, 151936)
    assert 0.01 < mx.std(logits).item() < 100
