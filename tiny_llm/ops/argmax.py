"""The place of the largest value of the last axis, greedy decoding's choice, and those of the few largest."""

from __future__ import annotations

import mlx.core as mx

from tiny_llm.ops.backend import cpu, on_cpu

_BLOCK = 128


def argmax_ref(x: mx.array) -> mx.array:
    """Return uint32 [...] for x [..., N]: the lowest place among equals; a NaN is larger than any number."""
    return mx.argmax(x, axis=-1)


def argmax(x: mx.array) -> mx.array:
    """Where the last axis of x [..., N] is largest; see ``argmax_ref``."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"[argmax] expected at least one value a row, got shape {x.shape}")
    return cpu.argmax(x) if on_cpu("argmax", x) else argmax_ref(x)


def largest_ref(x: mx.array, count: int) -> mx.array:
    """Where each row of x [R, N] is largest, uint32 [R, count]: best first, the lower of equals before."""
    return mx.argsort(-x, axis=-1)[:, :count]


def largest(x: mx.array, count: int) -> mx.array:
    """Where the rows of x [R, N] are largest: ``count`` places, at most N; see ``largest_ref``.

    Only the ``count`` blocks of the largest maxima are sorted: what is in another block comes behind these
    maxima, which are larger, or as large and before it. MLX sorts all of a row to part it on a GPU.
    """
    if not 0 < count * _BLOCK < x.shape[-1]:
        return largest_ref(x, count)
    blocks = mx.pad(x, [(0, 0), (0, -x.shape[-1] % _BLOCK)], constant_values=-mx.inf)
    blocks = blocks.reshape(x.shape[0], -1, _BLOCK)
    best = mx.sort(largest_ref(mx.max(blocks, axis=-1), count), axis=-1)[:, :, None]
    places = (best * _BLOCK + mx.arange(_BLOCK, dtype=mx.uint32)).reshape(x.shape[0], -1)
    values = mx.take_along_axis(blocks, best, axis=1).reshape(x.shape[0], -1)
    return mx.take_along_axis(places, largest_ref(values, count), axis=-1)
