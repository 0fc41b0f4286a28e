"""Softmax: known values, no overflow, masked entries."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from tiny_llm.ops.softmax import softmax

pytestmark = pytest.mark.chapter("1.1")


def test_by_hand() -> None:
    got = softmax(mx.array([[0.0, math.log(3)], [5.0, 5.0]])).tolist()
    assert got == [pytest.approx([0.25, 0.75]), pytest.approx([0.5, 0.5])], "exp(x) / sum of the row"


def test_rows_and_not_columns_add_up_to_one() -> None:
    got = softmax(mx.random.normal((3, 5), key=mx.random.key(0)))
    assert got.sum(axis=-1).tolist() == pytest.approx([1.0] * 3), "the sum runs over the last axis"


def test_large_scores_do_not_overflow() -> None:
    got = softmax(mx.array([1000.0, 1000.0 + math.log(3)])).tolist()
    assert got == pytest.approx([0.25, 0.75], rel=1e-4), "subtract the largest value before exp"
    assert softmax(mx.array([[0.0, 1000.0], [1000.0, 0.0]])).tolist() == [[0, 1], [1, 0]], (
        "wherever it stands"
    )
    assert softmax(mx.array([-20_000.0, -20_001.0]))[0].item() == pytest.approx(1 / (1 + math.exp(-1))), (
        "any row"
    )


def test_each_row_is_a_row_of_its_own() -> None:
    """Far below the other row: with the largest of all subtracted its sum is 0."""
    got = softmax(mx.array([[0.0, math.log(3)], [-1000.0, -1000.0 + math.log(3)]]))
    assert got.tolist() == [pytest.approx([0.25, 0.75], rel=1e-4)] * 2, "a row's own largest is subtracted"
    shaped = softmax(got[:, None]).shape
    assert shaped == (2, 1, 2), "any number of axes"


def test_a_masked_score_gets_nothing() -> None:
    assert softmax(mx.array([0.0, -mx.inf, 0.0])).tolist() == [0.5, 0.0, 0.5]


def test_half_precision_sums_in_float32() -> None:
    # 4,096 equal weights: a float16 or bfloat16 running sum stops growing at 2,048 or 256.
    for dtype in (mx.float16, mx.bfloat16):
        got = softmax(mx.zeros((4096,), dtype=dtype))
        assert got.dtype == dtype, f"the result has x's dtype, {dtype}; got {got.dtype}"
        assert got[0].item() == 1 / 4096, f"{dtype}: the sum must be made in float32"


def test_half_precision_subtracts_in_float32() -> None:
    # 0.1 less 40 is -40 in bfloat16, and its exponential 10 % too small; 1 / 256 less 9 is -9 in float16.
    for dtype, least, most in ((mx.bfloat16, 0.1, 40.0), (mx.float16, 1 / 256, 9.0)):
        x = mx.array([least, most], dtype=dtype)
        got, exact = softmax(x)[0].item(), math.exp(x[0].item() - most)
        rounding = mx.finfo(dtype).eps / 2
        off = abs(got - exact / (1 + exact)) / exact
        assert off <= rounding, f"{dtype}: off by {off:.2%}: go to float32 before you subtract"


def test_half_precision_is_rounded_once() -> None:
    x = mx.random.normal((8, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    once = softmax(x.astype(mx.float32)).astype(mx.bfloat16)
    assert mx.mean(softmax(x) != once).item() < 0.02, "the quotient is rounded, and not what it is made of"


def test_no_values_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"\[softmax\] expected at least one value a row, got shape \(2, 0\)"
    ):
        softmax(mx.zeros((2, 0)))
