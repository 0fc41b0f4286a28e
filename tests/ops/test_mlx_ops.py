"""MLX's own operations, the floor of the GPU backends, on MLX's CPU device: as ``ref``, in three dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import mlx.core as mx
import pytest

from tiny_llm.data import Pages, QuantizedTensor
from tiny_llm.ops import backend, work_lists
from tiny_llm.ops.attention import attention, attention_ref
from tiny_llm.ops.embedding import embedding, embedding_ref
from tiny_llm.ops.kv_pool import KvFormat, Pool
from tiny_llm.ops.linear import linear, linear_ref
from tiny_llm.ops.paged_attention import paged_attention, paged_attention_ref
from tiny_llm.ops.quantized_matmul import quantized_matmul, quantized_matmul_ref
from tiny_llm.ops.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from tiny_llm.ops.rope import rope, rope_frequencies, rope_qk, rope_qk_ref, rope_ref
from tiny_llm.ops.swiglu import fused, swiglu, swiglu_ref
from tiny_llm.ops.work_lists import WorkLists

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# MLX's operations round between their parts on a CPU; its kernels for GPUs do so less.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}
SUM_TOLERANCE = TOLERANCE | {mx.float16: 2e-2, mx.bfloat16: 0.12}  # a sum of 16-bit numbers, in 16 bits
Off = Callable[[mx.array, mx.array], float]
H, K, D = 6, 2, 32

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def on_mlx() -> Iterator[None]:
    with backend.use("mlx"):
        yield


def normal(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


@pytest.fixture
def same(off: Off) -> Callable[..., None]:
    def check(got: mx.array, expected: mx.array, tolerance: dict[mx.Dtype, float] = TOLERANCE) -> None:
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert not got.size or off(got, expected) < tolerance[got.dtype]

    return check


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 64), (0, 8), (5, 896)])
def test_rms_norm(shape: tuple[int, ...], dtype: mx.Dtype, same: Callable[..., None]) -> None:
    x, residual, weight = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate([shape, shape, shape[-1:]]))
    same(rms_norm(x, 96.5 * weight, 1e-6), rms_norm_ref(x, 96.5 * weight, 1e-6))
    got, expected = add_rms_norm(x, residual, weight, 1e-6), add_rms_norm_ref(x, residual, weight, 1e-6)
    same(got[0], expected[0])
    same(got[1], expected[1])


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(("T", "H", "K", "D"), [(1, 1, 1, 2), (3, 14, 2, 64), (2, 4, 1, 80), (0, 2, 2, 8)])
def test_rope(
    T: int, H: int, K: int, D: int, normed: bool, dtype: mx.Dtype, same: Callable[..., None]
) -> None:
    q, k = normal(T, H, D, dtype=dtype), normal(T, K, D, seed=1, dtype=dtype)
    positions, inv_freq = mx.array([0, 7, 3100], mx.int32)[:T], rope_frequencies(D, 1e6)
    q_norm, k_norm = (96.5 * normal(D, seed=s, dtype=dtype) if normed else None for s in (2, 3))
    arguments = (q, k, positions, inv_freq, q_norm, k_norm, 1e-6)
    angles = TOLERANCE | {mx.float32: 1e-3}  # an inverse's inverse, times a position
    for got, expected in zip(rope_qk(*arguments), rope_qk_ref(*arguments), strict=True):
        same(got, expected, angles)
    same(rope(q, positions, inv_freq), rope_ref(q, positions, inv_freq), angles)


def test_swiglu(dtype: mx.Dtype, same: Callable[..., None]) -> None:
    gate, up = normal(3, 70, dtype=dtype) * 4, normal(3, 70, seed=1, dtype=dtype)
    same(swiglu(gate, up), swiglu_ref(gate, up))
    for rows in (3, 1):  # one kernel for all shapes
        same(fused()(gate[:rows], up[:rows]), swiglu_ref(gate[:rows], up[:rows]))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_matrices(bits: int, dtype: mx.Dtype, same: Callable[..., None]) -> None:
    dense, bias = normal(20, 128, seed=1, dtype=dtype), normal(20, seed=2, dtype=dtype)
    weight = QuantizedTensor(*mx.quantize(dense, 64, bits), 64, bits)
    for rows in (1, 5):
        x = normal(rows, 128, dtype=dtype)
        same(quantized_matmul(x, weight), quantized_matmul_ref(x, weight), SUM_TOLERANCE)
        same(linear(x, weight, bias), quantized_matmul_ref(x, weight) + bias, SUM_TOLERANCE)
        same(linear(x, dense, bias), linear_ref(x, dense, bias), SUM_TOLERANCE)
        same(linear(x, dense), linear_ref(x, dense), SUM_TOLERANCE)
    ids = mx.array([0, 19, 4])
    same(embedding(ids, weight), embedding_ref(ids, weight))
    assert mx.array_equal(embedding(ids, dense), dense[ids])


@pytest.mark.parametrize(("T", "offset", "S"), [(1, 0, 1), (1, 8, 9), (4, 0, 4), (12, 5, 17), (2, 3, 9)])
def test_attention(T: int, offset: int, S: int, dtype: mx.Dtype, same: Callable[..., None]) -> None:
    q, k, v = (normal(n, h, D, seed=n, dtype=dtype) for n, h in ((T, H), (S, K), (S, K)))
    got = attention(q, k, v, scale=0.2, offset=offset)
    same(got, attention_ref(q, k, v, scale=0.2, offset=offset))


class Step:
    """Sequences in a pool, before a step: ``lens`` tokens each after it, of which ``new`` come with it."""

    def __init__(
        self, lens: Sequence[int], new: Sequence[int], size: int, dtype: mx.Dtype, order: str = "shuffled"
    ) -> None:
        counts = [-(-length // size) for length in lens]
        blocks = list(range(1, 1 + sum(counts)))
        if order == "shuffled":
            blocks = [blocks[i] for i in mx.random.permutation(len(blocks), key=mx.random.key(9)).tolist()]
        ends = list(accumulate(counts))
        tables = [blocks[end - count : end] for count, end in zip(counts, ends, strict=True)]
        slots = [
            table[p // size] * size + p % size
            for table, length, rows in zip(tables, lens, new, strict=True)
            for p in range(length - rows, length)
        ]
        width = max(counts)
        self.pages = Pages(
            mx.array(slots, mx.int32),
            mx.array([table + [0] * (width - len(table)) for table in tables], mx.int32),
            mx.array([0, *accumulate(new)], mx.int32),
            mx.array(lens, mx.int32),
        )
        T = sum(new)
        self.q, self.k, self.v = (normal(T, h, D, seed=i, dtype=dtype) for i, h in enumerate((H, K, K)))
        shape = (1 + len(blocks), size, K, D)
        self.pool: Pool = normal(*shape, seed=7, dtype=dtype), normal(*shape, seed=8, dtype=dtype)

    def expected(self, window: int = 0) -> tuple[mx.array, Pool]:
        """By ``ref``, whose pools lie otherwise."""
        keys, values = self.pool
        pool = mx.contiguous(keys.transpose(0, 2, 3, 1)), mx.contiguous(values.swapaxes(1, 2))
        out, (keys, values) = paged_attention_ref(self.q, self.k, self.v, pool, self.pages, D**-0.5, window)
        return out, (keys.transpose(0, 3, 1, 2), values.swapaxes(1, 2))


BATCHES = {
    "alone": ([21], [1]),
    "the first token": ([1], [1]),
    "one class": ([21, 30, 17, 30], [1, 1, 1, 1]),
    "as long": ([40, 40], [1, 1]),
    "classes": ([3, 200, 5, 70, 201], [1, 1, 1, 1, 1]),
    "a chunk": ([50], [37]),
    "a prompt": ([33], [33]),
    "chunks": ([50, 9], [37, 9]),
    "decodes and chunks": ([90, 5, 100, 64, 20], [1, 1, 1, 12, 20]),
    "guesses": ([40, 33, 48, 70, 45], [4, 4, 4, 4, 2]),
    "guesses and decodes": ([40, 90, 33, 48, 41], [8, 1, 8, 1, 9]),
    "chunks first": ([64, 90, 20, 95], [12, 1, 20, 1]),
}


@pytest.mark.parametrize("window", [0, 1, 18, 33])
@pytest.mark.parametrize("order", ["consecutive", "shuffled"])
@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("case", BATCHES)
def test_paged_attention(
    case: str, size: int, order: str, window: int, dtype: mx.Dtype, same: Callable[..., None]
) -> None:
    step = Step(*BATCHES[case], size, dtype, order)
    expected, pool = step.expected(window)
    out, written = paged_attention(step.q, step.k, step.v, step.pool, step.pages, window=window)
    same(out, expected)
    for got, kept in zip(written, pool, strict=True):
        assert mx.array_equal(got, kept), "other places were written"


def test_a_class_is_cut_where_it_would_gather_too_much(
    dtype: mx.Dtype, same: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step([40, 33, 48, 47, 34], [1] * 5, 16, dtype)
    token_bytes = 2 * K * D * dtype.size
    sizes = work_lists.LayerSizes(16, H, K, token_bytes)
    assert len(WorkLists(step.pages).reads(sizes).groups) == 1
    monkeypatch.setattr(work_lists, "GATHER_BYTES", 2 * 48 * token_bytes)
    parts = WorkLists(step.pages).reads(sizes).groups
    assert [part.places.shape[0] for part in parts] == [2, 2, 1]
    out, _ = paged_attention(step.q, step.k, step.v, step.pool, step.pages)
    same(out, step.expected()[0])


def test_consecutive_blocks_are_read_where_they_lie(dtype: mx.Dtype) -> None:
    sizes = work_lists.LayerSizes(16, H, K, 2 * K * D * dtype.size)

    def places(order: str) -> list[object]:
        step = Step([100, 9, 70], [1, 1, 3], 16, dtype, order)
        return [group.places for group in WorkLists(step.pages).reads(sizes).groups]

    assert places("consecutive") == [slice(16, 116), slice(8 * 16, 8 * 16 + 9), slice(9 * 16, 9 * 16 + 70)]
    assert isinstance(places("shuffled")[0], mx.array)


def test_the_format_says_how_a_pool_lies(dtype: mx.Dtype) -> None:
    shapes = [array.shape for array in KvFormat(1, K, D, 16, dtype).arrays]
    assert shapes == [(16, K, D)] * 2
    with backend.use("ref"):
        shapes = [array.shape for array in KvFormat(1, K, D, 16, dtype).arrays]
    assert shapes == [(K, D, 16), (K, 16, D)]


def test_sequences_with_as_many_rows_are_one_call(dtype: mx.Dtype) -> None:
    """Guesses that are checked are a few rows of each sequence; a call a sequence would be a loop a layer."""
    sizes = work_lists.LayerSizes(16, H, K, 2 * K * D * dtype.size)
    step = Step([40, 33, 48, 40, 47, 90], [4, 4, 4, 1, 1, 20], 16, dtype)
    groups = WorkLists(step.pages).reads(sizes).groups
    assert [group.rows for group in groups] == [slice(0, 12), slice(12, 14), slice(14, 34)]
