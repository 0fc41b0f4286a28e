"""Log-probabilities are the model's own, before temperature and filters."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx
import pytest

from tiny_llm.ops import backend
from tiny_llm.sampling.logprobs import log_probabilities, reported, reported_ref, top_logprobs

pytestmark = pytest.mark.chapter("1.7")


@pytest.fixture(params=["ref", "cpu"], autouse=True)
def on_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of this file, once on each backend."""
    if request.param == "cpu" and not backend.works():
        pytest.skip("the CPU kernels are not built")
    with backend.use(request.param):
        yield


def test_log_probabilities_are_a_log_softmax() -> None:
    logits = [[0.0, math.log(3.0), -math.inf], [1000.0, 1000.0, 1000.0]]
    logp = log_probabilities(mx.array(logits))
    assert logp[0].tolist() == pytest.approx([math.log(0.25), math.log(0.75), -math.inf])
    assert logp[1].tolist() == pytest.approx([-math.log(3)] * 3), "large logits must not overflow"
    assert log_probabilities(mx.array([[0.0, -200.0]]))[0].tolist() == [0, -200], "nor small ones vanish"


def test_each_row_is_a_row_of_its_own_in_float32() -> None:
    logp = log_probabilities(mx.array([[0.0, 0.0], [-500.0, -500.0]], mx.bfloat16))
    assert logp.dtype == mx.float32
    assert logp.tolist() == [pytest.approx([-math.log(2)] * 2)] * 2
    tail = log_probabilities(mx.concatenate([mx.array([10.0]), mx.zeros(151_935)])[None])
    exact = 10 - math.log(math.exp(10) + 151_935)
    assert tail[0, 0].item() == pytest.approx(exact, abs=1e-4), (
        "small numbers are lost in a sum made by mx.sum"
    )
    wide = mx.random.normal((1, 5000), key=mx.random.key(0)).astype(mx.bfloat16)
    assert mx.sum(mx.exp(log_probabilities(wide))).item() == pytest.approx(1, abs=1e-4)


def test_chosen_token_first_then_the_likeliest() -> None:
    logits = mx.array([0.0, 2.0, 1.0, -1.0])
    assert list(top_logprobs(logits, 3, 2)) == [3, 1, 2]
    assert list(top_logprobs(logits, 1, 2)) == [1, 2], "the chosen one is not reported twice"
    assert list(top_logprobs(logits, 2, 0)) == [2]
    assert list(top_logprobs(logits, 0, 99)) == [0, 1, 2, 3], "asking for more than there are gives all"


def test_values_agree_with_the_whole_row() -> None:
    logits = mx.random.normal((501,), key=mx.random.key(3)) * 3
    row = log_probabilities(logits[None])[0].tolist()
    found = top_logprobs(logits, 7, 5)
    assert found == pytest.approx({i: row[i] for i in found})
    assert list(found.values())[1:] == pytest.approx(sorted(row, reverse=True)[:5])


@pytest.mark.parametrize(("rows", "vocab", "count"), [(3, 1, 1), (40, 700, 20), (2, 40001, 5)])
def test_rows_are_as_ref_has_them(rows: int, vocab: int, count: int) -> None:
    """Many equal logits, so that the order of ids is seen; every third token cannot come."""
    logits = mx.round(mx.random.normal((rows, vocab), key=mx.random.key(vocab)) * 3)
    logits = mx.where(mx.arange(vocab) % 3 == 2, -mx.inf, logits)
    logits = mx.where(mx.arange(vocab) < 2 * count, logits + 40, logits)  # so that none is left out by chance
    tokens = (mx.arange(rows) * 7 % vocab).astype(mx.uint32)
    chosen, ids, values = reported(logits, tokens, count)
    own, best, theirs = reported_ref(logits, tokens, count)
    assert (chosen.shape, ids.shape, values.shape) == ((rows,), (rows, count), (rows, count))
    assert chosen.tolist() == pytest.approx(own.tolist(), rel=1e-6, abs=1e-6)
    assert values.tolist() == [pytest.approx(row, rel=1e-6, abs=1e-6) for row in theirs.tolist()]
    if vocab < 1000:  # argpartition picks any of equals at its edge
        assert ids.tolist() == best.tolist()


def test_tokens_that_cannot_come_are_last_and_a_row_of_nan_is_nan() -> None:
    logits = mx.array([[-math.inf, 1.0, -math.inf, 1.0], [0.0, math.nan, 2.0, 0.0]])
    chosen, ids, values = reported(logits, mx.array([3, 0], mx.uint32), 4)
    assert ids[0].tolist() == [1, 3, 0, 2]
    assert values[0].tolist() == pytest.approx([-math.log(2), -math.log(2), -math.inf, -math.inf])
    assert chosen[0].item() == pytest.approx(-math.log(2))
    assert mx.all(mx.isnan(values[1])).item() and math.isnan(chosen[1].item())
