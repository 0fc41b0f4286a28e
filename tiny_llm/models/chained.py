"""Owns a decoder's layers as one operation of MLX's, for the CPU kernels: kept once, then played again.

To build a step's graph anew takes Python, and to walk it takes MLX, a quarter of the time that a small
model's step takes the kernels, on the same cores. But only a batch's and the cache's arrays are others.
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
"""Chains: one for each number of tokens, sequences and blocks."""


class Chained:
    """A ``Decoder`` on the CPU kernels; what they do not do alone is built anew in every step."""

    def __init__(self, model: Decoder) -> None:
        self.config: ModelConfig = model.config
        self.model = model
        self._chains: dict[tuple[object, ...], cpu.Chain] = {}
        self._is_chain = True  # as far as is known

    def __call__(self, batch: Batch, kv: KVCache) -> mx.array:
        """Logits [R, V], as the model gives them."""
        if self._is_chain and 0 < batch.tokens.size <= MOST_TOKENS and isinstance(kv, PagedCache):
            return self.model.head(*self._body(batch, kv), batch.logit_rows)
        return self.model(batch, kv)

    def _body(self, batch: Batch, kv: PagedCache) -> tuple[mx.array, mx.array | None]:
        """The model's, by the chain for such shapes; the first time it is made of the model's own graph."""
        assert batch.pages is not None, "a paged cache needs the batch's pages"
        pages, pools = batch.pages, kv.arrays()
        lists = pages.slot_mapping, pages.block_tables, pages.query_start_loc, pages.context_lens
        inputs = [batch.tokens, batch.positions, *lists, *pools]
        key = (batch.tokens.size, pages.block_tables.shape, pools[0].shape, pools[0].dtype)
        chain = self._chains.get(key)
        if chain is None:
            x, residual = self.model.body(batch, kv)
            assert residual is not None, "a model has layers"
            try:
                chain = cpu.Chain(inputs, [x, residual, *kv.arrays()])
            except ValueError:
                self._is_chain = False
                return x, residual
            if len(self._chains) == MOST_KEPT:
                del self._chains[next(iter(self._chains))]
            self._chains[key] = chain
        x, residual, *pools = chain(inputs)
        kv.put(pools)
        return x, residual
