"""What rank 0 tells the others: msgpack, read as these types or not at all. Nothing sent can run."""

from __future__ import annotations

from array import array
from functools import cache
from typing import Any

import msgspec

from tiny_llm.data import Join, Plan, PlanItem
from tiny_llm.errors import GroupError

Pairs = list[tuple[int, int]]


class Order(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Something to do, for the pages that ``engine`` numbers: each engine has its own."""

    engine: int


class Begin(Order, frozen=True):
    """Make room for keys and values: as ``PagedCache`` takes it, of ``KvFormat``'s blocks and dtype."""

    block_size: int
    kv_dtype: str
    max_blocks: int
    host_blocks: int


class DoStep(Order, frozen=True):
    """Move what ``plan`` moves, then compute it; its tokens below 0 are of ``drawn`` that come first.

    ``items`` are (sequence, tokens, start, block table, rows of logits), arrays as their bytes.
    """

    items: list[tuple[int, bytes, int, bytes, int]]
    num_blocks: int
    swap_out: Pairs
    copies: Pairs
    swap_in: Pairs
    joins: list[tuple[bytes, bytes, bytes]]
    drawn: int = 0

    @classmethod
    def of(cls, engine: int, plan: Plan, drawn: int = 0) -> DoStep:
        """``plan`` on its way, as far as it concerns pages and the model."""
        items = [
            (i.seq_id, i.tokens.tobytes(), i.start, i.block_table.tobytes(), i.logit_rows) for i in plan.items
        ]
        joins = [(join.to.tobytes(), join.slots.tobytes(), join.turns.tobytes()) for join in plan.joins]
        return cls(engine, items, plan.num_blocks, plan.swap_out, plan.copies, plan.swap_in, joins, drawn)

    @property
    def plan(self) -> Plan:
        """It, come to where it is carried out."""
        items = [
            PlanItem(seq_id, _ints(tokens), start, _ints(blocks), rows)
            for seq_id, tokens, start, blocks, rows in self.items
        ]
        joins = [Join(*map(_ints, join)) for join in self.joins]
        return Plan(items, self.num_blocks, self.swap_out, self.copies, self.swap_in, joins=joins)


class WarmUp(Order, frozen=True):
    """Run once what a GPU's kernels are compiled for."""

    most_blocks: int


class Forget(Order, frozen=True):
    """The engine is gone, and its pages with it."""


class Leave(Order, frozen=True):
    """There is no more to do."""


Told = Begin | DoStep | WarmUp | Forget | Leave


def written(value: object) -> bytes:
    """A message, or any plain value, as bytes."""
    return msgspec.msgpack.encode(value)


def read(data: bytes | bytearray, kind: Any) -> Any:
    """The ``kind`` that ``data`` is to be. Raises GroupError for anything else."""
    try:
        return _decoder(kind).decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise GroupError(f"What came from another rank cannot be read: {error}.") from None


@cache
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)


def _ints(data: bytes) -> array[int]:
    ints = array("i")
    ints.frombytes(data)
    return ints
