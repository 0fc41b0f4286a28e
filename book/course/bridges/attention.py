"""What ``ops/attention.py`` becomes where a learner has a kernels/cpu/attention.cpp of their own.

The overlay puts these definitions in the place of the reference's, and of those in a learner's Python file.
"""

from __future__ import annotations

import ctypes

import mlx.core as mx

from book.course.native import learners, pointers

_SIZES, _ALL = (16, 32, 64), 1 << 62  # of blocks, taken in turns


def windowed_ref(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, offset: int, window: int
) -> mx.array:
    """Attention of q [T, H, D] over k, v [S, K, D] by the learner's kernel, at once, in q's dtype.

    They lie in blocks here and there in a pool; NaNs lie behind the last key that a row sees, and in all
    other blocks. Keys and values of 16 bits come to the kernel as those of int8 do: with scales, which are
    powers of two, so that nothing rounds.
    """
    seen, scaled = offset + q.shape[0], k.itemsize == 2
    if not q.size:
        return q
    size = _SIZES[seen % 3]
    table = _table(-(-seen // size), max(0, offset + 1 - window) // size if window else 0)
    key_units, value_units = (_units(seen, first) if scaled else mx.ones(seen) for first in (0, 3))
    keys, values = (
        _pages(x[:seen].astype(mx.float32) / units[:, None, None], table, size)
        for x, units in ((k, key_units), (v, value_units))
    )
    of_tokens = (
        mx.broadcast_to(units[:, None, None], (seen, k.shape[1], 1)) for units in (key_units, value_units)
    )
    arrays = [
        mx.contiguous(q.astype(mx.float32)),
        mx.contiguous(keys.swapaxes(2, 3)),
        values,
        *(_pages(units, table, size).astype(mx.float16) for units in of_tokens),
        table,
        mx.zeros(q.shape),
    ]
    mx.eval(arrays)
    places = pointers(arrays)
    if not scaled:
        places[3:5] = [None, None]
    sizes = (*q.shape[:2], k.shape[1], q.shape[2], table.size, size, seen, window or _ALL)
    learners("attention").attention(*places, *map(ctypes.c_int64, sizes), ctypes.c_float(scale))
    return arrays[-1].astype(q.dtype)


def _units(seen: int, first: int) -> mx.array:
    """A scale for each token: 2, 0.5, ..., from another place of the same row of seven on."""
    return mx.array([2, 0.5, 1, 4, 0.25, 0.5, 8])[(mx.arange(seen) + first) % 7]


def _table(blocks: int, hidden: int) -> mx.array:
    """Numbers for so many blocks, every other one of a pool, the last first; 0 for those that no row sees."""
    numbers = 2 * mx.arange(blocks, 0, -1, dtype=mx.int32)
    return mx.where(mx.arange(blocks) < hidden, 0, numbers)


def _pages(x: mx.array, table: mx.array, size: int) -> mx.array:
    """x [seen, K, D] as blocks [N, K, S, D] of a pool; NaN behind its end, in block 0, and between them."""
    padded = mx.pad(x, [(0, -x.shape[0] % size), (0, 0), (0, 0)], constant_values=mx.array(mx.nan))
    blocks = padded.reshape(-1, size, *x.shape[1:]).swapaxes(1, 2)
    pool = mx.full((2 * table.size + 1, *blocks.shape[1:]), mx.nan)
    pool[table] = blocks
    pool[0] = mx.nan
    return pool
