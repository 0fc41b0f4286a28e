"""Owns the step from a plan of integers to the arrays that a model reads: the first arrays of a step."""

from __future__ import annotations

from array import array
from itertools import accumulate

import mlx.core as mx

from tiny_llm.data import Batch, Pages, Plan


def build_batch(plan: Plan, block_size: int, drawn: mx.array | None = None) -> Batch:
    """Lay the plan's items out one after the other: flat, nothing padded but short block tables.

    ``drawn`` uint32 [R] are the tokens that the step before draws: a token ``-1 - r`` of the plan is
    ``drawn[r]``, known or not.
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
        block_tables=_tables(plan),
        query_start_loc=_ints(array("i", starts)),
        context_lens=_ints(array("i", ends)),
    )
    ids = _ints(tokens) if drawn is None else _with_drawn(tokens, drawn)
    return Batch(ids, _ints(positions), tuple(starts), _ints(array("i", rows)), pages)


def _with_drawn(tokens: array[int], drawn: mx.array) -> mx.array:
    """Tokens of which some are still being drawn, as ``build_batch`` says."""
    rows = array("i", [-1 - token for token in tokens])
    drawn = drawn.astype(mx.int32)
    if rows == array("i", range(drawn.size)):  # every sequence goes on with its token
        return drawn
    if min(rows) >= 0:
        return drawn[_ints(rows)]
    ids, at = _ints(tokens), _ints(rows)
    return mx.where(at < 0, ids, drawn[mx.maximum(at, 0)])


def _tables(plan: Plan) -> mx.array:
    """Each item's blocks, int32 [B, W]. W is a multiple of 8: most steps have the shapes of the last one."""
    width = -(-max(len(item.block_table) for item in plan.items) // 8) * 8
    tables = array("i")
    for item in plan.items:
        tables.extend(item.block_table)
        missing = width - len(item.block_table)
        if missing:
            tables.frombytes(bytes(tables.itemsize * missing))
    shaped = memoryview(tables).cast("B").cast("i", (len(plan.items), width))  # no operation: it can be read
    return mx.array(shaped)  # type: ignore[arg-type]


def _ints(values: array[int]) -> mx.array:
    """An int32 array, made five times as fast as from a list."""
    return mx.array(memoryview(values))  # type: ignore[arg-type]
