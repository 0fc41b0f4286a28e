"""A step's arrays: every sequence's rows one behind the other, and where each of them belongs."""

from __future__ import annotations

from array import array

import mlx.core as mx
import pytest

from tiny_llm.data import Plan, PlanItem
from tiny_llm.engine.batch import build_batch

pytestmark = pytest.mark.chapter("2.9")

SIZE = 4
TABLE = (7, 2, 9, 5)
"""Blocks of a sequence lie anywhere."""


def item(number: int, tokens: list[int], start: int, blocks: tuple[int, ...], rows: int) -> PlanItem:
    """An item, as a plan has it."""
    return PlanItem(number, array("i", tokens), start, array("i", blocks), rows)


def plan_of(*items: PlanItem) -> Plan:
    """A step of these."""
    return Plan(list(items), 10, [], [], [])


DECODES = plan_of(item(0, [40], 9, TABLE[:3], 1), item(1, [41], 0, (3,), 1), item(2, [42], 7, (6, 1), 1))
MIXED = plan_of(
    item(0, [40], 9, TABLE[:3], 1),
    item(1, [50, 51, 52, 53, 54], 6, TABLE[:3], 0),
    item(2, [60, 61, 62], 0, (8,), 1),
    item(3, [70, 71, 72], 11, TABLE, 3),
)


def numbers(values: mx.array) -> list[int]:
    """A row of integers, which must be of 32 bits."""
    assert values.dtype == mx.int32, f"{values.dtype}, but indices are int32"
    return values.tolist()  # type: ignore[return-value]


def test_tokens_lie_one_sequence_behind_the_other() -> None:
    batch = build_batch(MIXED, SIZE)
    assert numbers(batch.tokens) == [40, 50, 51, 52, 53, 54, 60, 61, 62, 70, 71, 72], "no padding"
    assert batch.query_start_loc == (0, 1, 6, 9, 12), "a sequence's rows begin where the last one's end"
    assert batch.pages is not None
    assert numbers(batch.pages.query_start_loc) == [0, 1, 6, 9, 12]


def test_positions_are_those_in_the_sequence() -> None:
    batch = build_batch(MIXED, SIZE)
    assert numbers(batch.positions) == [9, 6, 7, 8, 9, 10, 0, 1, 2, 11, 12, 13]
    assert numbers(build_batch(DECODES, SIZE).positions) == [9, 0, 7]


def test_each_row_has_the_slot_of_its_own_block() -> None:
    batch = build_batch(MIXED, SIZE)
    assert batch.pages is not None
    expected = [9 * 4 + 1, 2 * 4 + 2, 2 * 4 + 3, 36, 37, 38, 32, 33, 34, 39, 5 * 4, 5 * 4 + 1]
    assert numbers(batch.pages.slot_mapping) == expected, "block * size + place in the block"


def test_a_block_of_another_size_and_a_table_that_reaches_further() -> None:
    plan = plan_of(item(0, [40], 17, (4, 1, 3, 2), 1), item(1, [41, 42], 15, (6, 5, 0), 1))
    batch = build_batch(plan, 16)
    assert batch.pages is not None
    assert numbers(batch.pages.slot_mapping) == [1 * 16 + 1, 6 * 16 + 15, 5 * 16]


def test_logits_are_wanted_of_the_last_rows_of_each() -> None:
    batch = build_batch(MIXED, SIZE)
    assert numbers(batch.logit_rows) == [0, 8, 9, 10, 11], "of one in the middle of its prompt none"
    few = plan_of(item(0, [1, 2, 3, 4], 0, (1,), 2), item(1, [5], 3, (2,), 1))
    assert numbers(build_batch(few, SIZE).logit_rows) == [2, 3, 4], "two of four rows"
    none = plan_of(item(0, [1, 2, 3, 4], 0, (1,), 0))
    assert build_batch(none, SIZE).logit_rows.shape == (0,)


def test_a_context_ends_with_the_new_tokens() -> None:
    batch = build_batch(MIXED, SIZE)
    assert batch.pages is not None
    assert numbers(batch.pages.context_lens) == [10, 11, 3, 14]


def test_block_tables_are_filled_up() -> None:
    batch = build_batch(MIXED, SIZE)
    assert batch.pages is not None and batch.pages.block_tables.dtype == mx.int32
    rows = [numbers(row[:4]) for row in batch.pages.block_tables]
    assert rows == [[7, 2, 9, 0], [7, 2, 9, 0], [8, 0, 0, 0], [*TABLE]]


def test_tokens_that_are_being_drawn_are_taken_from_there() -> None:
    drawn = mx.array([90, 91, 92], mx.uint32)
    ahead = [
        one._replace(tokens=array("i", [-1 - row])) for one, row in zip(DECODES.items, (2, 0, 1), strict=True)
    ]
    assert numbers(build_batch(plan_of(*ahead), SIZE, drawn).tokens) == [92, 90, 91], "-1 - r is drawn[r]"
    same = [one._replace(tokens=array("i", [-1 - row])) for row, one in enumerate(DECODES.items)]
    assert numbers(build_batch(plan_of(*same), SIZE, drawn).tokens) == [90, 91, 92]
    some = [ahead[0], item(5, [60, 61], 0, (8,), 1)]
    assert numbers(build_batch(plan_of(*some), SIZE, drawn).tokens) == [92, 60, 61], "some are known"


def test_a_plan_stays_as_it_is() -> None:
    before = [(one.tokens[:], one.block_table[:]) for one in MIXED.items]
    first, second = build_batch(MIXED, SIZE), build_batch(MIXED, SIZE)
    assert [(one.tokens, one.block_table) for one in MIXED.items] == before, "other ranks get the same plan"
    assert first.tokens.tolist() == second.tokens.tolist()


def test_a_long_prompt_alone() -> None:
    tokens = list(range(1000, 1300))
    batch = build_batch(plan_of(item(0, tokens, 0, tuple(range(75)), 1)), SIZE)
    assert numbers(batch.tokens) == tokens and numbers(batch.positions) == list(range(300))
    assert batch.query_start_loc == (0, 300) and numbers(batch.logit_rows) == [299]
    assert batch.pages is not None and numbers(batch.pages.slot_mapping) == list(range(300))
