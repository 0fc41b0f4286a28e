"""A dense cache for one sequence: one growing array of keys and one of values a layer.

The CPU kernels read keys and values in blocks, as all do that are kept as int8; there the arrays are pools
whose blocks lie in order.
"""

from __future__ import annotations

import mlx.core as mx

from tiny_llm.data import Batch, Pages
from tiny_llm.ops.attention import attention
from tiny_llm.ops.backend import active
from tiny_llm.ops.kv_pool import KvFormat, Pool, num_blocks, resize_pool
from tiny_llm.ops.paged_attention import paged_attention

FIRST_CAPACITY = 256  # tokens; then it doubles, so that a token is copied about once in its life
_BLOCK_SIZE = 32


class DenseCache:
    """Keys and values of one sequence. Satisfies ``data.KVCache``.

    A step's rows continue the sequence: its first row is position ``length``.
    ``dtype`` is what they are kept in; None: as they come.
    Callers may drop the newest tokens with ``truncate``, after a rejected draft or a failed step.
    """

    def __init__(self, num_layers: int, dtype: mx.Dtype | None = None) -> None:
        self._dtype = dtype
        self._pools: list[Pool | None] = [None] * num_layers
        self._pages: tuple[Batch, Pages] | None = None  # of the step under way, the same for all layers
        self._keys: list[mx.array | None] = [None] * num_layers  # [capacity, K, D]
        self._values: list[mx.array | None] = [None] * num_layers
        self._lengths = [0] * num_layers

    @property
    def length(self) -> int:
        """Tokens that every layer holds."""
        return min(self._lengths)

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens, at most those there are. Their arrays stay allocated."""
        assert 0 <= length <= self.length, f"cannot truncate {self.length} tokens to {length}"
        self._lengths = [length] * len(self._lengths)

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, batch: Batch, *, window: int = 0
    ) -> mx.array:
        """Append k, v [T, K, D] to the layer and return q's attention [T, H, D] over all it now holds."""
        sequences = len(batch.query_start_loc) - 1
        assert sequences == 1, f"DenseCache holds one sequence, got {sequences}"
        if active() == "cpu" or (self._dtype is not None and self._dtype == mx.int8):
            return self._attend_pool(layer, q, k, v, batch, window)
        return self.attend_arrays(layer, q, k, v, window=window)

    def attend_arrays(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, *, window: int = 0
    ) -> mx.array:
        """Append k, v [T, K, D] to the layer's arrays; return q's attention [T, H, D] over all they hold.

        The rows' positions begin at what the layer has held so far. Attention computes in q's dtype.
        """
        start = self._lengths[layer]
        end = self._lengths[layer] = start + q.shape[0]
        keys = self._keys[layer] = written(self._keys[layer], self._kept(k), start, end)
        values = self._values[layer] = written(self._values[layer], self._kept(v), start, end)
        seen = [kept[:end].astype(q.dtype) for kept in (keys, values)]
        return attention(q, *seen, scale=q.shape[-1] ** -0.5, offset=start, window=window)

    def _kept(self, new: mx.array) -> mx.array:
        return new if self._dtype is None else new.astype(self._dtype)

    def _attend_pool(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, batch: Batch, window: int
    ) -> mx.array:
        end = self._lengths[layer] = self._lengths[layer] + q.shape[0]
        pool = self._pools[layer]
        blocks = -(-capacity(end) // _BLOCK_SIZE)
        if pool is None:
            layer_format = KvFormat(1, k.shape[1], k.shape[2], _BLOCK_SIZE, self._dtype or k.dtype, False)
            pool = layer_format.empty_pool(blocks, blocks)
        elif num_blocks(pool) < blocks:
            pool = resize_pool(pool, blocks)
        if self._pages is None or self._pages[0] is not batch:
            self._pages = batch, _in_order(end - q.shape[0], end)
        out, self._pools[layer] = paged_attention(q, k, v, pool, self._pages[1], window=window)
        return out


def _in_order(start: int, end: int) -> Pages:
    """Rows ``start:end`` of one sequence whose blocks are 0, 1, 2 and on."""
    used = -(-end // _BLOCK_SIZE)
    return Pages(
        slot_mapping=mx.arange(start, end, dtype=mx.int32),
        block_tables=mx.arange(used, dtype=mx.int32)[None],
        query_start_loc=mx.array([0, end - start], mx.int32),
        context_lens=mx.array([end], mx.int32),
    )


def capacity(tokens: int) -> int:
    """Rows of the arrays that hold so many tokens: 256, doubled until they fit."""
    rows = FIRST_CAPACITY
    while rows < tokens:
        rows *= 2
    return rows


def written(store: mx.array | None, new: mx.array, start: int, end: int) -> mx.array:
    """Return ``store`` [rows, K, D] with ``new`` [T, K, D] at rows ``start:end``.

    If it does not fit, or there is no ``store`` yet, what it held goes into one of ``capacity(end)`` rows.
    """
    rows = 0 if store is None else store.shape[0]
    if end > rows:
        room = mx.zeros((capacity(end) - rows, *new.shape[1:]), dtype=new.dtype)
        store = room if store is None else mx.concatenate([store, room])
    assert store is not None
    store[start:end] = new
    return store
