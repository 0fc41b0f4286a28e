"""A dense cache for one sequence: one growing array of keys and one of values a layer."""

from __future__ import annotations

import mlx.core as mx

from tiny_llm.data import Batch
from tiny_llm.ops.attention import attention

_FIRST_CAPACITY = 256  # tokens; then it doubles, so that a token is copied about once in its life


class DenseCache:
    """Keys and values of one sequence. Satisfies ``data.KVCache``.

    A step's rows continue the sequence: its first row is position ``length``.
    Callers may drop the newest tokens with ``truncate``, after a rejected draft or a failed step.
    """

    def __init__(self, num_layers: int) -> None:
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

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array, batch: Batch) -> mx.array:
        """Append k, v [T, K, D] to the layer and return q's attention [T, H, D] over all it now holds."""
        assert len(batch.starts) == 2, f"DenseCache holds one sequence, got {len(batch.starts) - 1}"
        start = self._lengths[layer]
        end = start + q.shape[0]
        keys = self._keys[layer] = _written(self._keys[layer], k, start, end)
        values = self._values[layer] = _written(self._values[layer], v, start, end)
        self._lengths[layer] = end
        return attention(q, keys[:end], values[:end], scale=q.shape[-1] ** -0.5, offset=start)


def _written(store: mx.array | None, new: mx.array, start: int, end: int) -> mx.array:
    """Return ``store`` [capacity, K, D] with ``new`` at rows start:end, doubled until it fits."""
    capacity = 0 if store is None else store.shape[0]
    if end > capacity:
        grown = max(capacity, _FIRST_CAPACITY)
        while grown < end:
            grown *= 2
        room = mx.zeros((grown - capacity, *new.shape[1:]), dtype=new.dtype)
        store = room if store is None else mx.concatenate([store, room])
    assert store is not None
    store[start:end] = new
    return store
