"""RMSNorm: by hand, in float32 where it matters, and as transformers computes it."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.ops.rms_norm import rms_norm

pytestmark = pytest.mark.chapter("1.4")


def test_by_hand() -> None:
    """The mean square of (3, 4) is 12.5."""
    got = rms_norm(mx.array([[3.0, 4.0]]), mx.array([1.0, 10.0]), 0.0).flatten().tolist()
    root = 12.5**0.5
    assert got == pytest.approx([3 / root, 40 / root], rel=1e-5)


def test_zeros_stay_zeros() -> None:
    assert rms_norm(mx.zeros((1, 4)), mx.ones(4), 1e-6).tolist() == [[0.0] * 4], "eps keeps 0 / 0 away"


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
