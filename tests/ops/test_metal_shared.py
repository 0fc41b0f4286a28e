"""Sequences that begin alike, on Metal: what they share is read once, and a row has its bits as if alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import mlx.core as mx
import pytest

from tiny_llm.data import Pages
from tiny_llm.metalsim.run import watch
from tiny_llm.ops.kv_pool import KvFormat, Pool, settled
from tiny_llm.ops.paged_attention import kv_write, paged_attention, paged_attention_ref

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("where")]

Off = Callable[[mx.array, mx.array], float]
S = 16
# One rounding of the result, and in float32 what another order of a sum makes.
TOLERANCE = {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


def normal(*shape: int, seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def pages_of(tables: list[list[int]], lens: list[int], new: list[int]) -> Pages:
    """Sequences of ``lens`` tokens, of which the last ``new`` are queries, in these blocks."""
    width = max(map(len, tables))
    wide = [table + [0] * (width - len(table)) for table in tables]
    slots = [
        table[at // S] * S + at % S
        for table, end, rows in zip(tables, lens, new, strict=True)
        for at in range(end - rows, end)
    ]
    starts = [sum(new[:b]) for b in range(len(new) + 1)]
    return Pages(*(mx.array(x, mx.int32) for x in (slots, wide, starts, lens)))


def filled(blocks: int, K: int, D: int, dtype: mx.Dtype, kept: mx.Dtype) -> Pool:
    """A pool of ``kept`` with numbers in every place."""
    pool = KvFormat(1, K, D, S, kept, token_major=False).empty_pool(blocks, blocks)
    k, v = (normal(blocks * S, K, D, seed=seed, dtype=dtype) for seed in (1, 2))
    return settled(kv_write(pool, k, v, mx.arange(blocks * S, dtype=mx.int32)))


def nested() -> tuple[list[list[int]], list[int], list[int]]:
    """Tables, lengths and new rows: groups in groups, who ends with a span, who is alone, and chunks."""
    numbers = count(1)
    a, b, c = ([next(numbers) for _ in range(8)] for _ in range(3))
    lens = [270, 170, 386, 70, 257, 129, 128, 256, 300, 40]
    new = [1] * 8 + [3, 5]
    begin = [a + b, a, a + b + c, [], a + b, a, [], a, a + b, a[:2]]
    tables = [
        head + [next(numbers) for _ in range(-(-end // S) - len(head))]
        for head, end in zip(begin, lens, strict=True)
    ]
    return tables, lens, new


@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize(
    ("H", "K", "D", "dtype"),
    [(4, 2, 64, mx.float32), (6, 1, 128, mx.bfloat16), (7, 1, 80, mx.float16)],
    ids=str,
)
def test_a_row_has_the_bits_that_it_has_alone(
    H: int, K: int, D: int, dtype: mx.Dtype, int8: bool, off: Off
) -> None:
    tables, lens, new = nested()
    rows, blocks = sum(new), max(map(max, tables)) + 1
    q, k, v = (normal(rows, heads, D, seed=n, dtype=dtype) for n, heads in ((3, H), (4, K), (5, K)))
    pool = filled(blocks, K, D, dtype, mx.int8 if int8 else dtype)
    pages = pages_of(tables, lens, new)
    out, written = paged_attention(q, k, v, tuple(map(mx.array, pool)), pages)
    expected, _ = paged_attention_ref(q, k, v, tuple(map(mx.array, pool)), pages, D**-0.5)
    assert off(out, expected) < TOLERANCE[dtype]
    arrays = settled(written)
    for b, (table, end, count_) in enumerate(zip(tables, lens, new, strict=True)):
        own = slice(sum(new[:b]), sum(new[: b + 1]))
        alone = pages_of([table], [end], [count_])
        one, _ = paged_attention(q[own], k[own], v[own], tuple(map(mx.array, arrays)), alone)
        assert mx.array_equal(out[own], one).item(), f"sequence {b}"


@pytest.mark.parametrize(("rows", "pieces"), [(2, 1), (5, 1), (16, 1), (17, 2)])
def test_a_shared_span_is_read_once_for_up_to_16_rows(rows: int, pieces: int, where: str) -> None:
    if where != "metalsim":
        pytest.skip("what runs is seen in the simulator alone")
    K, D, shared = 1, 64, 8
    tables = [[*range(shared), shared + row] for row in range(rows)]
    q, k = normal(rows, 6, D, seed=0), normal(rows, K, D, seed=1)
    pool = filled(shared + rows, K, D, mx.float32, mx.float32)
    with watch() as seen:
        paged_attention(q, k, k, pool, pages_of(tables, [129] * rows, [1] * rows))
    names = [name for name, _ in seen]
    assert names == ["kv_write", "paged_attention", "paged_attention", "paged_attention_merge"]
    own, together = seen[1][1], seen[2][1]
    for array in ("keys", "values"):
        assert together.fetched[array] == pieces * 128 * K * D * 4
        assert own.fetched[array] == rows * K * D * 4
    assert together.loads["keys"] == -(-rows // 4) * 128 * K * D, (
        "a simdgroup takes 4 rows of 6 x 64 at a time"
    )
