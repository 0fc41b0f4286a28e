"""Owns the step from a plan of integers to the arrays that a model reads: the first arrays of a step."""

from __future__ import annotations

from array import array
from itertools import accumulate

import mlx.core as mx

from tiny_llm.data import Batch, Pages, Plan


def build_batch(plan: Plan, block_size: int, known: mx.array | None = None) -> Batch:
    """Lay the plan's items out one after the other: flat, nothing padded but short block tables.

    ``known`` int32 [T] are the tokens, where the plan could not name them yet.
    """
    items = plan.items
    starts = list(accumulate((len(item.tokens) for item in items), initial=0))
    tokens, positions, slots = array("i"), array("i"), array("i")
    for item in items:
        tokens.extend(item.tokens)
        if len(item.tokens) == 1:
            position = item.start
            positions.append(position)
            slots.append(item.block_table[position // block_size] * block_size + position % block_size)
        else:
            reach = range(item.start, item.start + len(item.tokens))
            positions.extend(reach)
            blocks = item.block_table
            slots.extend([blocks[p // block_size] * block_size + p % block_size for p in reach])
    ends = [item.start + len(item.tokens) for item in items]
    rows = [
        end - rows + i
        for item, end in zip(items, starts[1:], strict=True)
        if (rows := item.logit_rows)
        for i in range(rows)
    ]
    pages = Pages(
        slot_mapping=_ints(slots),
        block_tables=_tables(plan, [-(-end // block_size) for end in ends]),
        query_start_loc=_ints(array("i", starts)),
        context_lens=_ints(array("i", ends)),
    )
    ids = _ints(tokens) if known is None else known
    return Batch(ids, _ints(positions), tuple(starts), _ints(array("i", rows)), pages)


def _tables(plan: Plan, used: list[int]) -> mx.array:
    """Each item's blocks as far as they are used, int32 [B, W]."""
    width = max(used)
    tables = array("i")
    for item, count in zip(plan.items, used, strict=True):
        tables.extend(item.block_table[:count])
        if count < width:
            tables.frombytes(bytes(tables.itemsize * (width - count)))
    return _ints(tables).reshape(len(used), width)


def _ints(values: array[int]) -> mx.array:
    """An int32 array, made five times as fast as from a list."""
    return mx.array(memoryview(values))  # type: ignore[arg-type]
