"""Pools of any number of arrays: made, grown and copied alike."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

from tiny_llm.data import Pages
from tiny_llm.ops.backend import cpu, use, works
from tiny_llm.ops.kv_pool import KvFormat, Pool, copy_blocks, num_blocks, resize_pool
from tiny_llm.ops.paged_attention import paged_attention


def three_arrays(blocks: int, first: int = 0) -> Pool:
    """As int8 pages would have them, with scales beside: each block holds its own number."""
    numbers = mx.arange(first, first + blocks)
    shapes = ((2, 8, 16), (2, 16, 8), (2, 16))
    dtypes = (mx.int8, mx.bfloat16, mx.float32)
    arrays = [
        mx.broadcast_to(numbers.reshape(-1, *(1 for _ in shape)), (blocks, *shape)).astype(dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    return tuple(mx.contiguous(array) for array in arrays)


def held(pool: Pool) -> list[int]:
    """The number that each block holds, the same in all arrays."""
    found = [array.reshape(array.shape[0], -1).astype(mx.int32) for array in pool]
    for array in found:
        assert mx.array_equal(array, mx.broadcast_to(found[0][:, :1], array.shape)), "arrays differ"
    return found[0][:, 0].tolist()


def test_a_pool_of_three_arrays_is_copied_within_and_between(backend: str) -> None:
    pool, other = three_arrays(4), three_arrays(3, first=10)
    pool = copy_blocks(pool, pool, mx.array([[0, 3], [2, 1]], mx.int32))
    assert held(pool) == [0, 2, 2, 0]
    assert held(copy_blocks(pool, other, mx.array([[1, 0]], mx.int32))) == [2, 11, 12]
    assert held(pool) == [0, 2, 2, 0]


def test_a_pool_of_three_arrays_grows(backend: str) -> None:
    grown = resize_pool(three_arrays(3, first=5), 5)
    assert num_blocks(grown) == 5 and held(grown) == [5, 6, 7, 0, 0]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_an_empty_pool_is_as_its_format_says(backend: str, dtype: mx.Dtype) -> None:
    format = KvFormat(3, 2, 64, 16, dtype)
    pool = format.empty_pool(5, 5)
    assert [(array.shape[1:], array.dtype) for array in pool] == [(a.shape, a.dtype) for a in format.arrays]
    assert sum(array.nbytes for array in pool) * format.num_layers == 5 * format.block_bytes
    assert not any(mx.any(array).item() for array in pool)


STEPS = ([37, 3], [1, 20], [1, 1], [9, 1])  # new rows of two sequences


def attended(pool: Pool, kept: mx.Dtype) -> tuple[mx.array, Pool]:
    """All rows of float32 that two sequences get, whose keys and values are first rounded to ``kept``."""
    outs, lens = [], [0, 0]
    tables = [[5, 2, 3], [1, 4, 0]]
    for number, new in enumerate(STEPS):
        places = [(b, lens[b] + i) for b in (0, 1) for i in range(new[b])]
        lens = [length + more for length, more in zip(lens, new, strict=True)]
        pages = Pages(
            mx.array([16 * tables[b][place // 16] + place % 16 for b, place in places], mx.int32),
            mx.array(tables, mx.int32),
            mx.array([0, new[0], sum(new)], mx.int32),
            mx.array(lens, mx.int32),
        )
        q, k, v = (
            mx.random.normal((sum(new), heads, 64), key=mx.random.key(10 * number + heads + i))
            for i, heads in enumerate((6, 2, 2))
        )
        out, pool = paged_attention(
            q, k.astype(kept).astype(k.dtype), v.astype(kept).astype(v.dtype), pool, pages
        )
        outs.append(out)
    return mx.concatenate(outs), pool


@pytest.mark.parametrize("kept", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ref", "cpu", "mlx"])
def test_a_pool_narrower_than_what_is_computed_in_is_as_one_that_was_converted(
    name: str, kept: mx.Dtype, off: Callable[[mx.array, mx.array], float]
) -> None:
    """Attention of float32 rows is float32, over what was kept; only AVX512-BF16 rounds more."""
    if name == "cpu" and not works():
        pytest.skip("the CPU kernels are not built")
    with use(name):
        narrow, wide = (KvFormat(1, 2, 64, 16, dtype).empty_pool(6, 6) for dtype in (kept, mx.float32))
        got, pool = attended(narrow, mx.float32)
        expected, converted = attended(wide, kept)
        mx.eval(got, expected)
    assert got.dtype == mx.float32 and pool[0].dtype == kept
    rounded = name == "cpu" and kept == mx.bfloat16 and cpu.isa() == "avx512bf16"
    assert off(got, expected) < (8e-3 if rounded else 2e-6)
    for one, other in zip(pool, converted, strict=True):
        assert mx.array_equal(one.astype(mx.float32), other), "what is kept differs"
