"""The small ops on the CPU kernels: as ``ref`` has them, whatever the shape, the strides and the company."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
import pytest

from tiny_llm.metrics import fallbacks
from tiny_llm.ops import backend
from tiny_llm.ops.backend import cpu
from tiny_llm.ops.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from tiny_llm.ops.rope import rope, rope_frequencies, rope_qk, rope_qk_ref
from tiny_llm.ops.softmax import softmax, softmax_ref
from tiny_llm.ops.swiglu import swiglu, swiglu_ref

pytestmark = pytest.mark.skipif(not backend.works(), reason="the CPU kernels are not built")

SHAPES = [(1,), (3, 5), (0, 7), (2, 0, 9), (2, 3, 64), (40, 896)]


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    """Every op of this file runs on the kernels."""
    with backend.use("cpu"):
        yield


@pytest.fixture
def same(off: Callable[[mx.array, mx.array], float]) -> Callable[[mx.array, mx.array], None]:
    """Assert one shape, one dtype, and values that differ by rounding alone; there may be none."""

    def check(got: mx.array, expected: mx.array) -> None:
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert not got.size or off(got, expected) < 2e-6

    return check


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def strided(x: mx.array) -> mx.array:
    """The same values in another order in memory, with gaps."""
    return mx.contiguous(mx.concatenate([x, x], axis=-1).T).T[..., : x.shape[-1]]


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], same) -> None:
    x, residual, weight = normal(*shape), normal(*shape, seed=1), normal(shape[-1], seed=2)
    same(rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6))
    same(rms_norm(strided(x), weight, 1e-6), rms_norm_ref(x, weight, 1e-6))
    for view in (residual, strided(residual)):
        total, normed = add_rms_norm(x, view, weight, 1e-6)
        same(total, x + residual)
        same(normed, add_rms_norm_ref(x, residual, weight, 1e-6)[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_softmax(shape: tuple[int, ...], same) -> None:
    x = 10 * normal(*shape)
    same(softmax(x), softmax_ref(x) if x.size else x)
    same(softmax(strided(x)), softmax_ref(x) if x.size else x)


def test_softmax_of_masked_rows() -> None:
    x = mx.array([[0.0, -mx.inf, 0.0], [-mx.inf, -mx.inf, -mx.inf], [0.0, mx.nan, 1.0], [1.0, mx.inf, 0.0]])
    got, expected = np.array(softmax(x)), np.array(softmax_ref(x))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape: tuple[int, ...], same) -> None:
    gate, up = 30 * normal(*shape), normal(*shape, seed=1)
    same(swiglu(gate, up), swiglu_ref(gate, up))
    same(swiglu(strided(gate), strided(up)), swiglu_ref(gate, up))


@pytest.mark.parametrize("dim", [8, 10, 64, 80, 256])
@pytest.mark.parametrize("normed", ["neither", "q", "k", "both"])
def test_rope(dim: int, normed: str, same) -> None:
    """Two sizes of heads, some normed before, at positions in no order."""
    positions = mx.array([0, 7, 3, 4095, 100, 1], dtype=mx.int32)
    q, k = normal(6, 14, dim), normal(6, 2, dim, seed=1)
    q_norm, k_norm = (
        normal(dim, seed=s) if normed in (name, "both") else None for s, name in ((2, "q"), (3, "k"))
    )
    inv_freq = rope_frequencies(dim, 1e6)
    expected = rope_qk_ref(q, k, positions, inv_freq, q_norm, k_norm, 1e-6)
    for view in (q, strided(q)):
        got = rope_qk(view, strided(k), positions, inv_freq, q_norm, k_norm, 1e-6)
        for a, b in zip(got, expected, strict=True):
            same(a, b)
    if normed == "neither":
        same(rope(strided(k), positions.astype(mx.int64), inv_freq), expected[1])


def test_rope_far_away() -> None:
    """At position 100,000 and beyond sine and cosine are still those of the float32 angle."""
    positions, inv_freq = [100_000, 131_071, 1_000_003], rope_frequencies(128, 10_000.0)
    x = mx.concatenate([mx.ones((3, 1, 64)), mx.zeros((3, 1, 64))], axis=-1)
    angles = np.float32(positions)[:, None] * np.array(inv_freq)
    expected = np.concatenate([np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))], axis=-1)
    got = np.array(rope(x, mx.array(positions, dtype=mx.int32), inv_freq))[:, 0]
    assert np.abs(got - expected).max() < 1e-7


def test_no_tokens(same) -> None:
    none = mx.zeros((0, 2, 8))
    q, k = rope_qk(none, none, mx.zeros(0, mx.int32), mx.ones(4), None, None, 1e-6)
    same(q, none)
    same(k, none)


def test_a_row_does_not_depend_on_the_others() -> None:
    rows, more = normal(1, 1000), normal(300, 1000, seed=1)
    weight, inv_freq = normal(1000, seed=2), normal(500, seed=3)
    many = mx.concatenate([more[:150], rows, more[150:]])
    positions = mx.arange(301, dtype=mx.int32)
    for op in (
        softmax,
        lambda x: swiglu(x, x),
        lambda x: rms_norm(x, weight, 1e-6),
        lambda x: rope(x[:, None], positions if len(x) > 1 else positions[150:151], inv_freq),
    ):
        assert mx.array_equal(op(many)[150], op(rows)[0])


def test_other_dtypes_fall_back_to_ref_and_are_counted() -> None:
    x, before = normal(2, 8).astype(mx.bfloat16), dict(fallbacks().read())
    assert softmax(x).dtype == swiglu(x, x).dtype == rms_norm(x, x[0], 1e-6).dtype == mx.bfloat16
    after = fallbacks().read()
    assert [after[op] - before.get(op, 0) for op in ("softmax", "swiglu", "rms_norm")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, i: cpu.softmax(i), r"\[softmax\] expected x float32 \[..., N\] of .*, got int32 \[4\]"),
        (lambda x, i: cpu.softmax(mx.zeros((2, 0))), r"at least one value a row, got float32 \[2, 0\]"),
        (lambda x, i: cpu.softmax(mx.array(1.0)), r"got float32 \[\]"),
        (lambda x, i: cpu.swiglu(x, x[:1]), r"\[swiglu\] expected up like gate, float32 \[2, 4\], got"),
        (
            lambda x, i: cpu.rms_norm(x, i, 1e-6),
            r"\[rms_norm\] expected weight float32 \[4\], got int32 \[4\]",
        ),
        (lambda x, i: cpu.rope(x, i, x[0]), r"\[rope\] expected x float32 \[T, H, D\] with even D, got"),
        (
            lambda x, i: cpu.rope(x[None], i, x[0]),
            r"\[rope\] expected integer positions \[1\], got int32 \[4\]",
        ),
        (lambda x, i: cpu.rope(x[None], i[:1], x[0]), r"\[rope\] expected inv_freq float32 \[2\], got"),
        (
            lambda x, i: cpu.rope_qk(x[None], x[None], i[:1], x[0, :2], x[0, :1], None, 1e-6),
            r"\[rope_qk\] expected a norm float32 \[4\], got float32 \[1\]",
        ),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(mx.zeros((2, 4)), mx.zeros(4, mx.int32))
