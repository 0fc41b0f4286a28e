"""SwiGLU: by hand, and at its ends."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from tiny_llm.ops.swiglu import swiglu, swiglu_ref

pytestmark = pytest.mark.chapter("1.4")


def test_by_hand() -> None:
    """The sigmoid of ln 3 is 3/4."""
    got = swiglu(mx.array([math.log(3), 0.0]), mx.array([2.0, 5.0])).tolist()
    assert got == pytest.approx([math.log(3) * 0.75 * 2, 0.0]), "silu(gate) * up, silu(x) = x * sigmoid(x)"


def test_gate_and_up_are_not_the_same() -> None:
    got = swiglu(mx.array([1.0]), mx.array([-2.0])).item()
    swapped = swiglu(mx.array([-2.0]), mx.array([1.0])).item()
    assert got == pytest.approx(-2 / (1 + math.exp(-1))), (
        f"silu belongs on the gate; on up it gives {swapped:.3f}"
    )


def test_silu_is_made_in_float32_and_rounded_before_up_counts() -> None:
    gate, up = (mx.random.normal((512,), key=mx.random.key(i)).astype(mx.bfloat16) for i in range(2))
    wide = gate.astype(mx.float32)
    silu = wide / (1 + mx.exp(-wide))
    got = swiglu_ref(gate, up)
    expected, halves = silu.astype(mx.bfloat16) * up, gate / (1 + mx.exp(-gate)) * up
    assert got.dtype == mx.bfloat16 and mx.mean(got != expected).item() < 0.02
    assert mx.mean(halves != expected).item() > 0.1


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_its_ends(dtype: mx.Dtype) -> None:
    got = swiglu(mx.array([-1e4, 1e4], dtype=dtype), mx.array([1.0, 1.0], dtype=dtype))
    assert got.dtype == dtype
    assert got.tolist() == pytest.approx([0.0, 1e4], rel=1e-2), "far below 0 it is 0, far above it is x"


def test_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[swiglu\] expected gate and up of one shape"):
        swiglu(mx.zeros((2, 4)), mx.zeros((1, 4)))
