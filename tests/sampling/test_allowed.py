"""The ban on tokens that a form cannot go on with: in the rows that have one, and nowhere else."""

from __future__ import annotations

import random

import mlx.core as mx
import pytest

from tiny_llm.sampling.allowed import keep_allowed

pytestmark = pytest.mark.chapter("4.4")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_only_what_is_allowed_is_left(dtype: mx.Dtype) -> None:
    rng, vocab = random.Random(1), 77
    logits = mx.random.normal((4, vocab), key=mx.random.key(2)).astype(dtype)
    allowed = [bytes(rng.choice((0, 1, 200, 255)) for _ in range(vocab)) for _ in range(3)]
    got = keep_allowed(logits, [*allowed[:2], None, allowed[2]])
    assert got.dtype == mx.float32
    for row, mask in enumerate((*allowed[:2], None, allowed[2])):
        for token in range(vocab):
            expected = logits[row, token].item() if mask is None or mask[token] else -mx.inf
            assert got[row, token].item() == expected, f"row {row}, token {token}"


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="masks of 8 bytes, got one of 7"):
        keep_allowed(mx.zeros((2, 8)), [None, bytes(7)])


def test_whatever_stood_there_a_banned_token_is_banned() -> None:
    """Overflow and nan in what is allowed stay, so that they are seen."""
    logits = mx.array([[mx.inf, mx.nan, -mx.inf, 1.0, 0.0], [mx.inf, mx.nan, -mx.inf, -1.0, 0.0]])
    got = keep_allowed(logits, [bytes(5), bytes([255] * 5)])
    assert got[0].tolist() == [-mx.inf] * 5
    assert mx.array_equal(got[1], logits[1], equal_nan=True).item()
    assert logits[0, 0].item() == mx.inf and logits[0, 3].item() == 1, "the logits themselves stay"


def test_rows_that_all_may_be_anything_stay() -> None:
    logits = mx.arange(6).reshape(2, 3).astype(mx.float16)
    got = keep_allowed(logits, [None, None])
    assert got.dtype == mx.float32 and got.tolist() == logits.tolist()
    assert keep_allowed(logits[:1], [b"\0\1\0"]).tolist() == [[-mx.inf, 1.0, -mx.inf]]


def test_one_mask_of_another_size_is_seen_among_others() -> None:
    for allowed in ([bytes(8), bytes(9)], [bytes(7), bytes(9)], [None, b""]):
        with pytest.raises(ValueError, match="masks of 8 bytes"):
            keep_allowed(mx.zeros((2, 8)), allowed)
