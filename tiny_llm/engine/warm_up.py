"""Owns the steps that run before the first request, so that no request waits for a kernel to be compiled.

A GPU's kernels are compiled when they are first used, and many have a text of their own for so many rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import mlx.core as mx

from tiny_llm.data import Plan, PlanItem
from tiny_llm.engine.batch import build_batch
from tiny_llm.kv.paged import PagedCache
from tiny_llm.models.registry import Model
from tiny_llm.sampling.sampler import sample
from tiny_llm.sampling_params import SamplingParams

TOKENS = (1, 2, 4, 8, 16, 32, 64)
"""Of a step: from one of these to the next each kernel has one text."""
LONG = 128  # tokens before a row whose attention is cut into spans
_DRAWN = SamplingParams(temperature=1.0, seed=0)


def warm_up(model: Model, cache: PagedCache, most_blocks: int) -> None:
    """Run ``model`` over ``cache`` once for each text of a kernel, on the backend in use; it forgets all."""
    for plan in _plans(cache.format.block_size):
        if plan.num_blocks <= most_blocks:
            cache.prepare(plan)
            logits = model(build_batch(plan, cache.format.block_size), cache)
            rows = logits.shape[0]
            mx.eval(sample(logits, [_DRAWN] * rows, [0] * rows), *cache.arrays())
    cache.clear()


def _plans(block_size: int) -> Iterator[Plan]:
    """Steps of one sequence, all of whose logits are wanted, and one of two that begin alike."""
    for start, count in [*((0, tokens) for tokens in TOKENS), (LONG, 1)]:
        blocks = -(-(start + count) // block_size)
        item = PlanItem(0, array("i", [0] * count), start, array("i", range(blocks)), count)
        yield Plan([item], blocks)
    other = item._replace(seq_id=1, block_table=array("i", [*range(blocks - 1), blocks]))
    yield Plan([item, other], blocks + 1)
