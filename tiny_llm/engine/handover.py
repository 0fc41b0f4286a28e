"""Owns a prompt's way between two processes: its blocks leave one's pool and enter the other's prefix cache.

Both look there as a sequence does: what is there is a hit; what comes is registered and given back at once,
and lies as if a sequence had left it. Between two calls nothing is held, so nobody has to make room for it,
and what is lost halfway is computed. For the engine's thread, between two steps.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import mlx.core as mx

from tiny_llm.engine.engine import Engine


class Handover:
    """The blocks of ``tokens`` in ``engine``, the last token's excepted: its logits are needed.

    All but the last of these are full. Those of different ``salt`` share nothing; unless ``keep``, none goes
    to disk.
    """

    def __init__(self, engine: Engine, tokens: Sequence[int], salt: str, *, keep: bool = True) -> None:
        self.engine = engine
        self._blocks = engine.scheduler.blocks
        self._size = self._blocks.block_size
        self._tokens = array("i", tokens)
        self._table = self._blocks.table(salt, is_kept=keep, keeps_all=True)

    def there(self) -> int:
        """How many of the full ones are in the prefix cache, from the first on."""
        return len(self._blocks.hits(self._table, self._tokens)[1])

    def give(self, first: int, most: int) -> tuple[int, list[memoryview]]:
        """Full blocks from ``first`` on, ``most`` at most: how many are there, and what they hold."""
        blocks = self._blocks.hits(self._table, self._tokens)[1][first : first + most]
        return len(blocks), self.engine.runner.give(blocks) if blocks else []

    def give_last(self, first: int) -> list[memoryview]:
        """What block ``first`` holds, if that is the one that is not full, and all of it is there."""
        known = self._allocate(self._tokens) if first == (len(self._tokens) - 1) // self._size else None
        if known is None:
            return []
        is_there = known == len(self._tokens) - 1 > first * self._size
        data = self.engine.runner.give([self._table.blocks[first]]) if is_there else []
        self._blocks.free(self._table, self._tokens, known)
        return data

    def take(self, first: int, count: int, data: mx.array) -> bool:
        """Cache what blocks ``first`` and on hold: ``count`` of them, as they were given.

        False where there is no room, or what stands before them is not here any more.
        """
        end = first + count
        tokens = self._tokens[: min(end * self._size, len(self._tokens) - 1)]
        known = self._allocate(tokens) if end == self._blocks.blocks_for(len(tokens)) else None
        if known is None:
            return False
        there = known // self._size
        try:
            if there >= first:
                pairs = [(index - first, self._table.blocks[index]) for index in range(there, end)]
                self.engine.runner.take(data, count, pairs)
                known = len(tokens)
        finally:
            self._blocks.free(self._table, tokens, known)
        return there >= first

    def _allocate(self, tokens: array[int]) -> int | None:
        """As the block manager does, with what that moves."""
        known = self._blocks.allocate(self._table, tokens, spare=self.engine.scheduler.num_running)
        if known is not None:
            self.engine.runner.move(self._blocks.drain())
        return known
