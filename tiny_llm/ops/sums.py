"""Sums over a whole vocabulary that keep their digits. Chapter 1.7 stands on them.

On a CPU MLX adds a row's numbers one after another in float32, and a small number that is added to a large
sum is lost: 152,000 exponentials come out up to 0.03 % too small. Here a row is cut into blocks, and
each block's sum begins at 0.
"""

from __future__ import annotations

import mlx.core as mx

_BLOCK = 512  # about the square root of a vocabulary: as many numbers in a block as there are blocks


def row_sums(x: mx.array) -> mx.array:
    """Return float32 [..., 1], the sum of each row of x float32 [..., N]."""
    return mx.sum(mx.sum(_blocks(x), axis=-1), axis=-1, keepdims=True)


def sums_before(x: mx.array) -> mx.array:
    """Return float32 [..., N]: for each number of a row of x float32 [..., N], the sum of those before it."""
    blocks = _blocks(x)
    before_block = mx.cumsum(mx.sum(blocks, axis=-1), axis=-1, inclusive=False)
    within_block = mx.cumsum(blocks, axis=-1, inclusive=False)
    sums = before_block[..., None] + within_block
    return sums.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def _blocks(x: mx.array) -> mx.array:
    """Rows [..., N] as blocks [..., N / 512, 512]; the last one is filled up with zeros."""
    missing = -x.shape[-1] % _BLOCK
    unpadded = [(0, 0)] * (x.ndim - 1)
    return mx.pad(x, [*unpadded, (0, missing)]).reshape(*x.shape[:-1], -1, _BLOCK)
