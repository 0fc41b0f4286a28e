"""Pools of any number of arrays: made, grown and copied alike."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm.ops.kv_pool import KvFormat, Pool, copy_blocks, num_blocks, resize_pool


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
