"""Week 1's cache: none. Keeps nothing between steps, so the caller brings each sequence whole every time."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx

from tiny_llm.data import Batch
from tiny_llm.ops.attention import attention


class NoCache:
    """Attends over the batch's own rows, each sequence by itself. Satisfies ``data.KVCache``."""

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, batch: Batch, *, window: int = 0
    ) -> mx.array:
        """Return [T, H, D]: row t attends to its own sequence's rows up to t. q [T, H, D]; k, v [T, K, D]."""
        scale = q.shape[-1] ** -0.5
        outs = [
            attention(q[start:end], k[start:end], v[start:end], scale=scale, offset=0, window=window)
            for start, end in pairwise(batch.query_start_loc)
        ]
        return mx.concatenate(outs)
