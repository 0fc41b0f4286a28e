"""Owns a decoder's step for the CPU kernels: its graph is built once for such shapes, then played again.

To build it anew takes Python, and to walk it takes MLX, a quarter of the time that a small model's step takes
the kernels, on the same cores. But only a batch's and the cache's arrays are others.
"""

from __future__ import annotations

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.data import Batch, KVCache
from tiny_llm.kv.paged import PagedCache
from tiny_llm.models.decoder import Decoder
from tiny_llm.ops.backend import cpu

MOST_TOKENS = 64
"""Of a step that is played again: a larger one keeps the kernels busy anyway."""
MOST_KEPT = 32
"""Chains: one for each number of tokens, sequences, rows and blocks."""


class Chained:
    """A ``Decoder`` on the CPU kernels. Kernels in a row are one operation."""

    def __init__(self, model: Decoder) -> None:
        self.config: ModelConfig = model.config
        self.model = model
        self._chains: dict[tuple[object, ...], cpu.Chain] = {}
        self._can = True  # as far as is known

    def __call__(self, batch: Batch, kv: KVCache) -> mx.array:
        """Logits [R, V], as the model gives them."""
        pages = batch.pages
        fits = 0 < batch.tokens.size <= MOST_TOKENS
        if not (self._can and fits and pages is not None and isinstance(kv, PagedCache)):
            return self.model(batch, kv)
        pools = kv.arrays()
        lists = pages.slot_mapping, pages.block_tables, pages.query_start_loc, pages.context_lens
        inputs = [batch.tokens, batch.positions, batch.logit_rows, *lists, *pools]
        sizes = batch.tokens.size, batch.logit_rows.size, pages.block_tables.shape
        key = (*sizes, pools[0].shape, pools[0].dtype)
        chain = self._chains.get(key)
        if chain is None:
            logits = self.model(batch, kv)
            try:
                chain = cpu.Chain(inputs, [logits, *kv.arrays()])
            except ValueError:  # something was looked at while the graph was built, and is not in it
                self._can = False
                return logits
            if len(self._chains) == MOST_KEPT:
                del self._chains[next(iter(self._chains))]
            self._chains[key] = chain
        logits, *pools = chain(inputs)
        kv.put(pools)
        return logits
