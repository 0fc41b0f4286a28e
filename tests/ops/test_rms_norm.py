"""RMSNorm: by hand, in float32 where it matters, and as transformers computes it."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.ops.rms_norm import rms_norm, rms_norm_ref

pytestmark = pytest.mark.chapter("1.4")


def test_by_hand() -> None:
    """The mean square of (3, 4) is 12.5."""
    got = rms_norm(mx.array([[3.0, 4.0]]), mx.array([1.0, 10.0]), 0.0).flatten().tolist()
    root = 12.5**0.5
    assert got == pytest.approx([3 / root, 40 / root], rel=1e-5)


def test_eps_is_added_to_the_mean_square() -> None:
    """Rows of ordinary size do not show it: here it is as large as the mean square of the row."""
    got = rms_norm(mx.array([[0.3, 0.4], [3e-4, 4e-4]]), mx.ones(2), 0.125).tolist()
    assert got[0] == pytest.approx([0.3 / 0.25**0.5, 0.4 / 0.25**0.5], rel=1e-5), "inside of the root"
    assert got[1] == pytest.approx([3e-4 / 0.125**0.5, 4e-4 / 0.125**0.5], rel=1e-4), (
        "and it is the one given"
    )


def test_rows_are_normed_one_by_one(assert_close) -> None:
    x = mx.random.normal((4, 16), key=mx.random.key(0)) * mx.array([[1.0], [10.0], [100.0], [0.1]])
    alone = mx.concatenate([rms_norm(x[t : t + 1], mx.ones(16), 1e-6) for t in range(4)])
    assert_close(rms_norm(x, mx.ones(16), 1e-6), alone)
    stacked = rms_norm_ref(x.reshape(2, 2, 16), mx.ones(16), 1e-6)
    assert_close(stacked, alone.reshape(2, 2, 16))


def test_the_quotient_is_rounded_before_the_weight_counts() -> None:
    x, weight = (mx.random.normal((2, 256), key=mx.random.key(i)).astype(mx.bfloat16) for i in range(2))
    wide = x.astype(mx.float32)
    quotient = wide * mx.rsqrt(mx.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    got = rms_norm_ref(x, weight[0], 1e-6)
    once = (quotient * weight[0].astype(mx.float32)).astype(mx.bfloat16)
    twice = quotient.astype(mx.bfloat16) * weight[0]
    assert mx.mean(got != twice).item() < 0.02, "return to x's dtype first"
    assert mx.mean(once != twice).item() > 0.1


def test_zeros_stay_zeros() -> None:
    assert rms_norm(mx.zeros((1, 4)), mx.ones(4), 1e-6).tolist() == [[0.0] * 4], "eps keeps 0 / 0 away"
    half = rms_norm_ref(mx.zeros((1, 4), mx.float16), mx.ones(4, mx.float16), 1e-9)
    assert half.tolist() == [[0.0] * 4], "an eps that is no float16, too"


def test_as_transformers(assert_close, activations, golden: Path) -> None:
    seen = activations("qwen2_tied")
    stored = mx.load(str(golden / "qwen2_tied" / "model.safetensors"))
    weight = stored["model.layers.0.input_layernorm.weight"].astype(mx.float32)
    x, eps = seen["hidden.0"], 1e-6
    centred = x - mx.mean(x, axis=-1, keepdims=True)
    deviation = mx.sqrt(mx.mean(centred * centred, axis=-1, keepdims=True))
    root = mx.sqrt(mx.mean(x * x, axis=-1, keepdims=True))
    assert_close(
        rms_norm(x, weight, eps),
        seen["layer0.norm"],
        the_mean_was_subtracted_as_in_LayerNorm=centred / deviation * weight,
        the_weight_was_forgotten=x / root,
        the_sum_of_squares_and_not_their_mean=x / root / x.shape[-1] ** 0.5 * weight,
        no_square_root=x / root**2 * weight,
    )


def test_squares_are_summed_in_float32() -> None:
    got = rms_norm(mx.full((1, 64), 300.0, dtype=mx.float16), mx.ones(64, dtype=mx.float16), 1e-6)
    assert got.dtype == mx.float16
    assert got.tolist() == [pytest.approx([1.0] * 64)], "300 squared is no float16: square in float32"


def test_a_wrong_weight_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=r"\[rms_norm\] expected weight .*[(\[]4.*, got .*[(\[]2"):
        rms_norm(mx.zeros((2, 4)), mx.ones(2), 1e-6)
