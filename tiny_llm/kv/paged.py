"""Owns the pages: for each layer a pool of keys and one of values, cut into blocks. Chapter 3.1.

Which block is whose is the BlockManager's to say; here its plans are carried out: blocks are
copied, moved to host memory and back, new rows are written in place, and attention reads
them through block tables. Knows no sequence, no token and no request.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import mlx.core as mx

from tiny_llm.data import Batch, Plan
from tiny_llm.ops.paged_attention import copy_blocks, empty_pool, paged_attention, resize_pool

_TRIED = 64  # blocks
Pool = tuple[mx.array, mx.array]
"""Keys and values of one layer, in the layout of ops.paged_attention."""


class PagedCache:
    """Keys and values of many sequences, in blocks of ``block_size`` tokens. Satisfies ``data.KVCache``.

    ``heads`` K and ``head_dim`` D are the model's; ``dtype`` is what is stored.
    """

    def __init__(
        self, num_layers: int, heads: int, head_dim: int, *, block_size: int, max_blocks: int, dtype: mx.Dtype
    ) -> None:
        self.block_size = block_size
        self._shape = (heads, head_dim, block_size)
        self._dtype = dtype
        self._max_blocks = max_blocks
        self._num_layers = num_layers
        self._layers: list[Pool] = []
        self._host: list[Pool] = []

    @property
    def dtype(self) -> mx.Dtype:
        """What keys and values are kept in."""
        return self._dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        heads, dim, size = self._shape
        return 2 * self._num_layers * heads * dim * size * self._dtype.size

    def swap_ms(self) -> float:
        """Milliseconds that a block takes to host memory and back, measured on blocks of one layer."""
        pools = [empty_pool(self._shape, _TRIED, _TRIED, self._dtype) for _ in range(2)]
        pairs = mx.array([(i, i) for i in range(_TRIED)], mx.int32)
        taken = []
        for _ in range(3):  # the first touches memory that nobody has touched
            began = time.perf_counter()
            for source, target in (pools, reversed(pools)):
                mx.eval(copy_blocks(source, target, pairs))
            taken.append(time.perf_counter() - began)
        return 1e3 * min(taken) * self._num_layers / _TRIED

    def clear(self) -> None:
        """Let go of all arrays, after a step that failed half way."""
        self._layers, self._host = [], []

    def prepare(self, plan: Plan) -> None:
        """Grow to the plan's blocks, then swap out, copy and swap in as it says."""
        self._layers = self._sized(self._layers, plan.num_blocks)
        if plan.swap_out:
            most = 1 + max(slot for _, slot in plan.swap_out)
            self._host = self._sized(self._host, max(most, _blocks(self._host)))
            self._host = _copied(self._layers, self._host, plan.swap_out)
        if plan.copies:
            self._layers = _copied(self._layers, self._layers, plan.copies)
        if plan.swap_in:
            self._layers = _copied(self._host, self._layers, plan.swap_in)

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array, batch: Batch) -> mx.array:
        """Write k, v [T, K, D] to their slots; return q's attention [T, H, D] over its sequence so far."""
        assert batch.pages is not None, "a paged cache needs the batch's pages"
        out, *pool = paged_attention(q, k, v, self._layers[layer], batch.pages)
        self._layers[layer] = (pool[0], pool[1])
        return out

    def _sized(self, pools: list[Pool], blocks: int) -> list[Pool]:
        if not pools:
            one = (self._shape, blocks, self._max_blocks, self._dtype)
            return [empty_pool(*one) for _ in range(self._num_layers)]
        if _blocks(pools) >= blocks:
            return pools
        return [resize_pool(pool, blocks) for pool in pools]


def _blocks(pools: list[Pool]) -> int:
    return pools[0][0].shape[0] if pools else 0


def _copied(source: list[Pool], target: list[Pool], pairs: Sequence[tuple[int, int]]) -> list[Pool]:
    moved = mx.array(list(pairs), mx.int32)
    return [copy_blocks(old, new, moved) for old, new in zip(source, target, strict=True)]
