"""Owns what stays in the pool though nobody runs on it: pinned prompts, and how prompts are joined of them.

Integers only: whose blocks they are, and which rows go where.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection

from tiny_llm.data import Join, Sequence
from tiny_llm.kv.block_table import BlockTable
from tiny_llm.kv.blocks import BlockManager


class Pins:
    """Prompts whose blocks no one may take, by the number under which each is pinned."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._tables: dict[int, BlockTable] = {}

    @property
    def tables(self) -> Collection[BlockTable]:
        """Read them, never write them."""
        return self._tables.values()

    @property
    def used_blocks(self) -> int:
        """Blocks that are pinned; one that several share counts once."""
        return len({block for table in self.tables for block in table.blocks})

    def __contains__(self, number: int) -> bool:
        return number in self._tables

    def keep(self, seq: Sequence, table: BlockTable) -> None:
        """Pin what is to be pinned of a sequence that ends, if all of that is computed."""
        if seq.pin is None:
            return
        number, tokens = seq.pin
        if number not in self and seq.num_computed_tokens >= tokens:
            self._blocks.register(table, seq.tokens, seq.num_computed_tokens)
            self._tables[number] = self._blocks.fork(table, tokens)

    def release(self, number: int) -> None:
        """Let go of what is pinned so; nothing if nothing is."""
        if table := self._tables.pop(number, None):
            self._blocks.free(table)

    def clear(self) -> None:
        """The pool's arrays are lost: nothing is pinned any more."""
        for number in list(self._tables):
            self.release(number)

    def are_there(self, seq: Sequence) -> bool:
        """Whether all is pinned of which a sequence's prompt is joined."""
        return all(part.source in self for part in seq.parts)

    def spared(self, seq: Sequence, known: int) -> int:
        """Tokens that need not be computed of a sequence of which ``known`` are there."""
        return known + sum(max(0, part.end - max(known, part.start)) for part in seq.parts)

    def join(self, seq: Sequence, table: BlockTable, joins: list[Join]) -> int:
        """Take the parts at which a sequence has arrived, by moves that ``joins`` gets.

        Return how many of its tokens there are up to its next part: those are to be computed.
        """
        for part in seq.parts:
            if part.start <= seq.num_computed_tokens < part.end:
                source, turn = self._tables[part.source], part.start - part.first
                joins.append(self._join(table, seq.num_computed_tokens, part.end, source, turn))
                seq.num_computed_tokens = part.end
        ahead = [part.start for part in seq.parts if part.start > seq.num_computed_tokens]
        return min(ahead, default=len(seq.tokens))

    def _join(self, table: BlockTable, start: int, end: int, source: BlockTable, turn: int) -> Join:
        """Rows ``start:end`` from ``source``, ``turn`` positions before; in their blocks, others stay."""
        size = self._blocks.block_size
        first, last = start // size, self._blocks.blocks_for(end)
        slots, turns = array("i"), array("i")
        for position in range(first * size, last * size):
            moves = start <= position < end
            there, blocks = (position - turn, source.blocks) if moves else (position, table.blocks)
            slots.append(blocks[there // size] * size + there % size)
            turns.append(turn if moves else 0)
        return Join(table.blocks[first:last], slots, turns)
