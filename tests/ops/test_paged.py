"""Attention through block tables: whose keys a row sees wherever they lie, ragged lengths, windows, int8."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tiny_llm.data import Pages
from tiny_llm.ops import paged_attention as module
from tiny_llm.ops.attention import attention
from tiny_llm.ops.kv_pool import Pool
from tiny_llm.ops.paged_attention import paged_attention_ref, quantized

pytestmark = pytest.mark.chapter("3.2")

S, H, K, D = 4, 4, 2, 8
Sequences = list[tuple[mx.array, mx.array, mx.array]]


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def sequences(lens: list[int], new: list[int]) -> Sequences:
    """For each, queries [new, H, D] of its last tokens, and keys and values [length, K, D]."""
    return [
        (normal(rows, H, D, seed=9 * b), normal(end, K, D, seed=9 * b + 1), normal(end, K, D, seed=9 * b + 2))
        for b, (end, rows) in enumerate(zip(lens, new, strict=True))
    ]


def in_pool(
    batch: Sequences, *, window: int = 0, size: int = S
) -> tuple[mx.array, mx.array, mx.array, Pool, Pages]:
    """All rows, and a pool [N, ...] in which the sequences' blocks alternate, from the last one to the first.

    NaN is what nobody has written: new tokens, what lies behind them, and block 0, which stands in a table
    where no row sees, or nothing is.
    """
    B, width = len(batch), max(-(-k.shape[0] // size) for _, k, _ in batch)
    tables = np.zeros((B, width), np.int32)
    keys, values = np.full((B * width + 1, K, D, size), np.nan), np.full((B * width + 1, K, size, D), np.nan)
    slots = []
    for b, (q, k, v) in enumerate(batch):
        known = k.shape[0] - q.shape[0]
        for i in range(max(0, known + 1 - window) // size if window else 0, -(-k.shape[0] // size)):
            tables[b, i] = block = B * (width - i) - b
            for place in range(max(0, min(size, known - i * size))):
                keys[block, :, :, place] = np.array(k[i * size + place])
                values[block, :, place] = np.array(v[i * size + place])
        slots += [int(tables[b, at // size]) * size + at % size for at in range(known, k.shape[0])]
    starts = np.cumsum([0, *(q.shape[0] for q, _, _ in batch)])
    lens = [k.shape[0] for _, k, _ in batch]
    pages = Pages(*(mx.array(np.array(numbers, np.int32)) for numbers in (slots, tables, starts, lens)))
    rows = [mx.concatenate([one[i][-one[0].shape[0] :] for one in batch]) for i in range(3)]
    return rows[0], rows[1], rows[2], (mx.array(keys, mx.float32), mx.array(values, mx.float32)), pages


def defined(q: mx.array, k: mx.array, v: mx.array, *, window: int = 0) -> mx.array:
    """The definition in float64: all scores at once."""
    rows, keys, values = (np.array(x.astype(mx.float32), np.float64) for x in (q, k, v))
    T, end = rows.shape[0], keys.shape[0]
    keys, values = (np.repeat(x, rows.shape[1] // x.shape[1], axis=1) for x in (keys, values))
    scores = np.einsum("thd,shd->hts", rows, keys) * rows.shape[2] ** -0.5
    behind = np.arange(end - T, end)[:, None] - np.arange(end)[None]
    scores[:, (behind < 0) | (behind >= (window or end))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return mx.array(np.einsum("hts,shd->thd", weights, values).astype(np.float32))


def check(got: mx.array, batch: Sequences, *, window: int = 0, tolerance: float = 3e-6) -> None:
    expected = mx.concatenate([defined(*one, window=window) for one in batch])
    assert got.shape == expected.shape, f"{got.shape}, not {expected.shape}"
    error = (mx.abs(got.astype(mx.float32) - expected).max(axis=(1, 2)) / mx.abs(expected).max()).tolist()
    owner = [b for b, (q, _, _) in enumerate(batch) for _ in range(q.shape[0])]
    wrong = [f"row {t}, of sequence {owner[t]}" for t, e in enumerate(error) if not e <= tolerance]
    assert not wrong, (
        f"{len(wrong)} of {len(error)} rows are off: {', '.join(wrong[:4])}; {got[0, 0, :3].tolist()}"
    )


@pytest.mark.parametrize(
    ("lens", "new"),
    [([1], [1]), ([9], [9]), ([4, 8, 5, 13, 1], [1] * 5), ([7, 12, 3, 10], [1, 5, 3, 10]), ([23, 2], [2, 2])],
    ids=str,
)
def test_each_row_sees_its_own_sequence_wherever_its_blocks_lie(lens: list[int], new: list[int]) -> None:
    batch = sequences(lens, new)
    for size in (S, 16):
        q, k, v, pool, pages = in_pool(batch, size=size)
        check(paged_attention_ref(q, k, v, pool, pages, D**-0.5)[0], batch)


def test_the_pool_comes_back_with_the_new_tokens_in_it() -> None:
    batch = sequences([7, 12], [3, 1])
    q, k, v, pool, pages = in_pool(batch)
    _, (keys, values) = paged_attention_ref(q, k, v, pool, pages, 1.0)
    for row, slot in enumerate(pages.slot_mapping.tolist()):  # type: ignore[arg-type]
        assert mx.array_equal(keys[slot // S, :, :, slot % S], k[row]), (
            f"the key of row {row} is not in its slot"
        )
        assert mx.array_equal(values[slot // S, :, slot % S], v[row]), (
            f"the value of row {row} is not in its slot"
        )


def test_the_scale_is_the_callers() -> None:
    batch = sequences([6], [2])
    q, k, v, pool, pages = in_pool(batch)
    check(paged_attention_ref(q / 3, k, v, pool, pages, 3 * D**-0.5)[0], batch)


@pytest.mark.parametrize("window", [1, 3, 4, 5, 9, 30])
def test_a_window(window: int) -> None:
    """What no row sees may be anything, and its blocks may be gone: then 0 is in the table."""
    batch = sequences([21, 6, 9], [1, 1, 4])
    for size in (S, 16):
        q, k, v, pool, pages = in_pool(batch, window=window, size=size)
        check(paged_attention_ref(q, k, v, pool, pages, D**-0.5, window)[0], batch, window=window)


def test_blocks_that_no_row_sees_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is read comes to attention as the queries' dtype, up to the sequence's last token."""
    read: list[int] = []
    seen: list[tuple[int, int, bool]] = []

    def blocks_read(pool: Pool, table: mx.array) -> tuple[mx.array, mx.array]:
        read.append(table.size)
        return reader(pool, table)

    def windowed_ref(q: mx.array, k: mx.array, v: mx.array, **rest: Any) -> mx.array:
        seen.append((k.shape[0], v.shape[0], k.dtype == v.dtype == q.dtype))
        return attention_of(q, k, v, **rest)

    reader, attention_of = module.blocks_read, module.windowed_ref
    monkeypatch.setattr(module, "blocks_read", blocks_read)
    monkeypatch.setattr(module, "windowed_ref", windowed_ref)
    cases = {0: ([6, 2, 3], [21, 6, 9]), 5: ([2, 2, 3], [5, 6, 9]), 4: ([2, 2, 3], [5, 6, 9])}
    for window, (blocks, tokens) in cases.items():
        q, k, v, pool, pages = in_pool(sequences([21, 6, 9], [1, 1, 3]), window=window)
        paged_attention_ref(*(x.astype(mx.float16) for x in (q, k, v)), pool, pages, 1.0, window)
        assert read == blocks, f"blocks read with a window of {window}"
        assert seen == [(n, n, True) for n in tokens], f"keys and values with a window of {window}"
        read.clear()
        seen.clear()


def test_answers_have_the_queries_dtype() -> None:
    batch = sequences([9, 6], [2, 1])
    q, k, v, pool, pages = in_pool(batch)
    got = paged_attention_ref(*(x.astype(mx.bfloat16) for x in (q, k, v)), pool, pages, D**-0.5)[0]
    assert got.dtype == mx.bfloat16
    check(got, batch, tolerance=2e-2)


def test_what_is_kept_as_int8_is_read_back_as_it_is_kept() -> None:
    """The new token's key, too: it is written first."""
    batch = sequences([6, 3], [6, 3])
    q, k, v, _, pages = in_pool(batch)
    pool: Pool = (
        *(mx.zeros(s, mx.int8) for s in ((5, K, D, S), (5, K, S, D))),
        *[mx.zeros((5, K, S), mx.float16)] * 2,
    )
    pool = (*pool[:3], mx.zeros((5, K, S), mx.float16))
    got = paged_attention_ref(q, k, v, pool, pages, D**-0.5)[0]

    def kept(x: mx.array) -> mx.array:
        steps, scales = quantized(x)
        return steps.astype(mx.float32) * scales.astype(mx.float32)[..., None]

    check(got, [(q, kept(k), kept(v)) for q, k, v in batch])


# C++: a learner's attention.cpp is what `attention` runs, over blocks of 16, 32 or 64 tokens that are every
# other block of a pool, the last one first; all else in the pool is NaN.

CPP = [
    (17, 20, 2, 1, 8),
    (20, 129, 1, 1, 8),
    (17, 257, 2, 1, 8),
    (40, 133, 2, 2, 20),
    (3, 270, 4, 2, 20),
    (33, 560, 2, 1, 16),
    (60, 600, 6, 3, 24),
]


def attended(
    T: int, end: int, heads: int, shared: int, dim: int, window: int = 0
) -> tuple[mx.array, Sequences]:
    one = (normal(T, heads, dim), normal(end, shared, dim, seed=1), normal(end, shared, dim, seed=2))
    return attention(*one, scale=dim**-0.5, offset=end - T, window=window), [one]


@pytest.mark.parametrize(("T", "end", "heads", "shared", "dim"), CPP)
def test_spans_are_gathered_by_the_block_table(
    backend: str, T: int, end: int, heads: int, shared: int, dim: int
) -> None:
    check(*attended(T, end, heads, shared, dim))


@pytest.mark.parametrize("end", [257, 258, 259])
def test_few_rows_find_their_blocks_where_they_lie(backend: str, end: int) -> None:
    """So few rows are not worth a copy: keys and values are used in place, through block_part alone."""
    check(*attended(2, end, 4, 2, 64))


@pytest.mark.parametrize("window", [3, 40, 300])
def test_spans_where_a_window_begins(backend: str, window: int) -> None:
    check(*attended(20, 600, 2, 1, 8, window), window=window)
