"""Fused kernels by themselves, without MLX: by hand, as defined, in the same bits as the kernels apart.

Around each array lie numbers that must not count and not change; in one test, memory that nobody may touch.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import shutil
from collections.abc import Sequence
from math import log, pi

import numpy as np
import pytest

from book.course.native import learners

pytestmark = [
    pytest.mark.chapter("2.7"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
]
Array = np.ndarray
MARGIN = 64
"""Numbers before and behind each array; more than a vector has."""
WIDTHS = (1, 2, 15, 16, 17, 31, 33, 64, 100)


WIDE = [False]
"""Whether the kernels that are called have this machine's vectors; else those that any machine has."""


@pytest.fixture(params=["4 floats", "this machine's"], scope="module", autouse=True)
def vectors(request: pytest.FixtureRequest) -> None:
    """Each test once with vectors of 4 floats, and once with the widest that there are."""
    WIDE[0] = request.param != "4 floats"


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def placed(array: Array) -> tuple[Array, Array]:
    """A copy with margins, and all of that memory: large numbers around an input, NaN around an output."""
    around = np.nan if array.size and np.isnan(array).all() else 12_345
    full = np.full(array.size + 2 * MARGIN, around, array.dtype)
    inner = full[MARGIN : MARGIN + array.size].reshape(array.shape)
    inner[...] = array
    return inner, full


def call(
    library: str, name: str, inputs: Sequence[Array | None], outputs: Sequence[Array], *numbers: float
) -> list[Array]:
    """Call a kernel: inputs, outputs like those given and full of NaN, numbers. Returns the outputs."""
    ins = [None if it is None else placed(it) for it in inputs]
    outs = [placed(np.full_like(it, np.nan)) for it in outputs]  # without numbers, none has margins of NaN
    before = [None if it is None else it[1].copy() for it in ins]
    run(library, name, [it and it[0] for it in ins], [it[0] for it in outs], numbers)
    for given, it in zip(before, ins, strict=True):
        assert it is None or np.array_equal(given, it[1], equal_nan=True), "an input was written to"
    for inner, full in outs:
        outside = np.concatenate([full[:MARGIN], full[full.size - MARGIN :]])
        kept = np.isnan(outside) if inner.size else outside == 12_345
        assert kept.all(), "numbers were written before the beginning or behind the end"
        assert not np.isnan(inner).any() or any(it is not None and np.isnan(it).any() for it in inputs), (
            f"of {inner.size} outputs, {np.isnan(inner).sum()} were not written, or are NaN; "
            f"the first is number {int(np.argmax(np.isnan(inner.ravel())))}"
        )
    return [inner for inner, _ in outs]


def run(
    library: str, name: str, ins: Sequence[Array | None], outs: Sequence[Array], numbers: Sequence[float]
) -> None:
    """The C function, whose outputs come behind the inputs that are float32 but for RoPE's two last."""
    last = 2 if name == "rope_qk" else 0
    arrays = [*ins[: len(ins) - last], *outs, *ins[len(ins) - last :]]
    places = [None if it is None else ctypes.c_void_p(it.ctypes.data) for it in arrays]
    sizes = [ctypes.c_float(n) if isinstance(n, float) else ctypes.c_int64(n) for n in numbers]
    getattr(learners(library, quick=True, wide=WIDE[0]), name)(*places, *sizes)


def add_norm(x: Array, residual: Array | None, weight: Array, eps: float = 1e-6) -> list[Array]:
    """The sum and its norm."""
    return call("rms_norm", "add_rms_norm", [x, residual, weight], [x, x], *x.shape, eps)


def norm(x: Array, weight: Array, eps: float = 1e-6) -> Array:
    """The kernel without a residual, which writes no sum: a row [..., E] at a time."""
    rows, (out,) = x.reshape(-1, x.shape[-1]), [np.empty_like(x)]
    run("rms_norm", "add_rms_norm", [rows, None, weight], [rows, out], (*rows.shape, eps))
    return out


def gate(gates: Array, ups: Array) -> Array:
    """silu(gates) * ups."""
    return call("swiglu", "swiglu", [gates, ups], [gates], gates.size)[0]


def rope(
    q: Array,
    k: Array,
    positions: Sequence[int],
    frequencies: Array,
    norms: tuple[Array | None, Array | None] = (None, None),
    eps: float = 1e-6,
) -> list[Array]:
    """q [T, H, D] and k [T, K, D], turned."""
    angles = [np.array(positions, np.int32), frequencies.astype(np.float32)]
    (T, H, D), K = q.shape, k.shape[1]
    return call("rope", "rope_qk", [q, k, *norms, *angles], [q, k], T, H, K, D, eps)


def same_bits(got: Array, expected: Array, why: str) -> None:
    """Equal, each of them."""
    wrong = np.argwhere(got != expected)
    first = tuple(wrong[0]) if len(wrong) else ()
    assert not len(wrong), f"{len(wrong)} of {got.size} differ, the first at {[*map(int, first)]}: {why}"


def close(got: Array, expected: Array, why: str = "", tolerance: float = 2e-6) -> None:
    """As in float64, up to some roundings of the largest."""
    error = np.abs(got - expected) / (np.abs(expected).max(initial=0.0) or 1)
    assert error.max(initial=0.0) <= tolerance, (
        f"off by {error.max():.1g} of the largest, first at "
        f"{[int(n) for n in np.argwhere(error > tolerance)[0]]}: {why}"
    )


def test_a_sum_and_its_norm_by_hand() -> None:
    """1 + 2 and 1 + 3; the mean of their squares is 12.5."""
    x, residual, weight = (np.array(it, np.float32) for it in ([[1, 1]], [[2, 3]], [1, 10]))
    total, normed = add_norm(x, residual, weight, 0.0)
    assert total.tolist() == [[3, 4]], "the first output is x + residual"
    expected = pytest.approx([3 / 12.5**0.5, 40 / 12.5**0.5])
    assert normed[0].tolist() == expected, "the second is the sum's norm"


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_and_norms_of_rows(width: int) -> None:
    """Rows of several sizes: of small ones eps is a part."""
    size = np.array([[1], [1e-3], [300], [1], [0]], np.float32)
    x, residual, weight = size * normal(5, width), size * normal(5, width, seed=1), normal(width, seed=2)
    total, normed = add_norm(x, residual, weight, 1e-5)
    same_bits(total, x + residual, "a float32 sum")
    wide = total.astype(np.float64)
    expected = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5) * weight
    for row in range(5):
        close(normed[row], expected[row], f"row {row}")


@pytest.mark.parametrize("width", WIDTHS)
def test_fused_it_has_the_bits_of_two_kernels(width: int) -> None:
    x, residual, weight = normal(3, width), normal(3, width, seed=1), normal(width, seed=2)
    total, normed = add_norm(x, residual, weight)
    same_bits(normed, norm(x + residual, weight), "the norm alone, of the sum, gives other bits")
    alone = add_norm(x[1:2], residual[1:2], weight)
    same_bits(normed[1:2], alone[1], "a row has other bits alone")
    same_bits(total[1:2], alone[0], "a row has other bits alone")


def test_many_rows() -> None:
    """More than a thread takes at once."""
    x, residual, weight = normal(900, 33), normal(900, 33, seed=1), normal(33, seed=2)
    total, normed = add_norm(x, residual, weight)
    same_bits(total, x + residual, "a float32 sum")
    same_bits(normed, norm(x + residual, weight), "the norm alone, of the sum, gives other bits")


def test_a_gate_by_hand() -> None:
    """The sigmoid of ln 3 is 3/4, that of 0 a half."""
    got = gate(np.array([log(3), 0, 1], np.float32), np.array([2, 5, -2], np.float32))
    assert got.tolist() == pytest.approx([log(3) * 0.75 * 2, 0, -2 / (1 + np.exp(-1))]), "silu is of the gate"


@pytest.mark.parametrize("count", [0, *range(1, 50), 8192, 8193, 20_005])
def test_gates_of_any_number(count: int) -> None:
    gates, ups = 6 * normal(count), normal(count, seed=1)
    wide = gates.astype(np.float64)
    close(gate(gates, ups), wide / (1 + np.exp(-wide)) * ups)


def test_a_gates_bits_do_not_depend_on_its_place() -> None:
    """In a whole vector, or among the last few."""
    gates, ups = 15 * normal(400), normal(400, seed=1)
    whole = gate(gates, ups)
    for count in (1, 2, 3, 7, 15, 17):
        parts = [slice(first, first + count) for first in range(0, 400, count)]
        got = np.concatenate([gate(gates[part], ups[part]) for part in parts])
        same_bits(got, whole, f"{count} at a time, not {whole.size}")


def test_the_ends_of_a_gate() -> None:
    """Far below 0 nothing is left, far above it is the gate itself; NaN is of its own place alone."""
    for spare in (0, 15, 16):
        gates = np.array([-1e4, -200, -80, 80, 1e4, np.nan] + [1] * spare, np.float32)
        got = gate(gates, np.full_like(gates, 2))
        assert got[:5].tolist() == pytest.approx([0, 0, 0, 160, 2e4], abs=1e-30)
        assert np.isnan(got[5]) and not np.isnan(got[6:]).any()


def test_a_quarter_turn_by_hand() -> None:
    """Only the first of two pairs turns: (a, b, c, d) becomes (-c, b, a, d)."""
    x = np.array([[[1, 2, 3, 4]]], np.float32)
    q, k = rope(x, 10 * x, [1], np.array([pi / 2, 0]))
    assert q.ravel().tolist() == pytest.approx([-3, 2, 1, 4], abs=1e-5), "pairs are half a head apart"
    assert k.ravel().tolist() == pytest.approx([-30, 20, 10, 40], abs=1e-5), "keys turn as queries do"


def turned(x: Array, positions: Sequence[int], frequencies: Array) -> Array:
    """The definition: an angle is a float32 product, all else is in float64."""
    angles = np.array(positions, np.float32)[:, None] * frequencies.astype(np.float32)
    sines, cosines = (f(angles.astype(np.float64))[:, None] for f in (np.sin, np.cos))
    a, b = np.split(x.astype(np.float64), 2, axis=-1)
    return np.concatenate([a * cosines - b * sines, b * cosines + a * sines], axis=-1)


@pytest.mark.parametrize("half", [1, 3, 4, 5, 8, 9, 16, 19, 32, 40])
def test_tokens_turn_by_their_own_positions(half: int) -> None:
    """Far on in a text, from the beginning again, twice the same; 3 heads of queries, 2 of keys."""
    positions = [0, 1, 2, 100_003, 7, 7, 999_999]
    q, k = normal(7, 3, 2 * half), normal(7, 2, 2 * half, seed=1)
    frequencies = 10_000.0 ** (-np.arange(half) / half)
    got = rope(q, k, positions, frequencies)
    for x, heads in zip((q, k), got, strict=True):
        for t, position in enumerate(positions):
            close(heads[t], turned(x, positions, frequencies)[t], f"head, entry; position {position}")


def test_many_tokens() -> None:
    """More than a thread takes at once."""
    q, k, positions = normal(120, 3, 34), normal(120, 1, 34, seed=1), [*range(50, 170)]
    frequencies = 100.0 ** (-np.arange(17) / 17)
    for x, got in zip((q, k), rope(q, k, positions, frequencies), strict=True):
        close(got, turned(x, positions, frequencies), "token, head, entry")


def test_a_pairs_bits_do_not_depend_on_its_place() -> None:
    """In a whole vector, or among the last few; and not on who else turns."""
    q, k, frequencies = normal(2, 2, 80), normal(2, 1, 80, seed=1), 100.0 ** (-np.arange(40) / 40)
    whole = rope(q, k, [3, 1001], frequencies)
    for half in (1, 7, 15, 16, 17, 31, 33, 39):
        first = np.concatenate([q[..., :half], q[..., 40 : 40 + half]], axis=-1)
        (got, _) = rope(first, first, [3, 1001], frequencies[:half])
        same_bits(got[..., :half], whole[0][..., :half], f"of {half} pairs")
        same_bits(got[..., half:], whole[0][..., 40 : 40 + half], f"of {half} pairs")
    alone = rope(q[1:], k[1:, :0], [1001], frequencies)[0]
    same_bits(alone, whole[0][1:], "without keys, and the token before")


@pytest.mark.parametrize("dim", [2, 6, 34, 44, 128])
@pytest.mark.parametrize("given", ["neither", "queries", "keys", "both"])
def test_heads_are_normed_before_they_turn(dim: int, given: str) -> None:
    """Each head by itself, by a weight that queries have and one that keys have: the bits of two kernels."""
    q, k = 3 * normal(4, 3, dim), normal(4, 2, dim, seed=1)
    k[1] *= 1e-3
    norms = (
        normal(dim, seed=2) if given in ("queries", "both") else None,
        normal(dim, seed=3) if given in ("keys", "both") else None,
    )
    positions, frequencies = [5, 6, 0, 70_000], 50.0 ** (-np.arange(dim // 2) / dim)
    got = rope(q, k, positions, frequencies, norms, 1e-5)
    normed = [x if weight is None else norm(x, weight, 1e-5) for x, weight in zip((q, k), norms, strict=True)]
    expected = rope(normed[0], normed[1], positions, frequencies)
    for name, one, other in zip(("queries", "keys"), got, expected, strict=True):
        same_bits(one, other, f"{name}: the norm alone, then the turn, gives other bits")


def test_position_0_changes_nothing() -> None:
    q, k = normal(1, 2, 34), normal(1, 1, 34, seed=1)
    got = rope(q, k, [0], np.ones(17))
    same_bits(got[0], q, "position 0 is no turn")
    same_bits(got[1], k, "position 0 is no turn")


def at_an_edge(array: Array, first: bool) -> Array:
    """A copy behind which memory ends, or before which it begins if ``first``: whoever goes on is killed."""
    page, room = mmap.PAGESIZE, -(-max(1, array.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + page)
    closed = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + (0 if first else room)
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(closed), ctypes.c_size_t(page), 0)
    begin = page if first else room - array.nbytes
    where = np.frombuffer(memory, array.dtype, array.size, begin).reshape(array.shape)
    where[...] = array
    return where


def all_kernels(half: int, first: bool) -> None:
    """Each of them, once, on arrays at an edge of memory."""

    def placed(array: Array) -> Array:
        return at_an_edge(array, first)

    q, weight, out = (placed(normal(1, 2 * half, seed=seed)) for seed in range(3))
    other, angles = placed(np.zeros_like(q)), placed(np.ones(half, np.float32))
    run("rms_norm", "add_rms_norm", [q, q, weight], [other, out], (1, 2 * half, 1e-6))
    run("swiglu", "swiglu", [q, weight], [out], (2 * half,))
    position = placed(np.zeros(1, np.int32))
    heads = [q, q, weight, weight, position, angles]
    run("rope", "rope_qk", heads, [out, other], (1, 1, 1, 2 * half, 1e-6))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("half", [1, 5, 17, 20])
def test_nothing_outside_of_an_array_is_read(half: int, first: bool) -> None:
    """In a process that may die of it."""
    for library in ("rms_norm", "swiglu", "rope"):
        learners(library, quick=True, wide=WIDE[0])
    child = os.fork()
    if not child:
        faulthandler.disable()
        try:
            all_kernels(half, first)
        finally:
            os._exit(0)
    died = os.WTERMSIG(os.waitpid(child, 0)[1])
    edge = "before the beginning" if first else "behind the end"
    assert not died, f"{half} pairs: somebody reads or writes {edge} of an array (signal {died})"
