"""Owns a prompt's way between two processes: its blocks leave one's pool and enter the other's prefix cache.

Both look there as a sequence does: what is there is a hit; what comes is registered and given back at once,
and lies as if a sequence had left it. Between two calls nothing is held, so nobody has to make room for it,
and what is lost halfway is computed. For the engine's thread, between two steps.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import mlx.core as mx

from tiny_llm.data import Plan
from tiny_llm.engine.engine import Engine


class Handover:
    """The full blocks of ``tokens`` in ``engine``, the last token's excepted: its logits are needed.

    Those of different ``salt`` share nothing; unless ``keep``, none goes to disk.
    """

    def __init__(self, engine: Engine, tokens: Sequence[int], salt: str, *, keep: bool = True) -> None:
        self.engine = engine
        self._size = engine.scheduler.blocks.block_size
        self.num_blocks = (len(tokens) - 1) // self._size
        self._tokens = array("i", tokens)
        self._table = engine.scheduler.blocks.table(salt, is_kept=keep, keeps_all=True)

    def there(self) -> int:
        """How many of its first blocks are in the prefix cache."""
        return len(self.engine.scheduler.blocks.hits(self._table, self._tokens)[1])

    def give(self, first: int, most: int) -> tuple[int, list[memoryview]]:
        """Of blocks ``first`` and on those that are there, ``most`` at most: how many, and what they hold."""
        blocks = self.engine.scheduler.blocks.hits(self._table, self._tokens)[1][first : first + most]
        return len(blocks), self.engine.runner.give(blocks) if blocks else []

    def take(self, first: int, count: int, data: mx.array) -> bool:
        """Cache what blocks ``first`` and on hold: ``count`` of them, as they were given.

        False where there is no room, or what stands before them is not here any more.
        """
        blocks, runner = self.engine.scheduler.blocks, self.engine.runner
        end = first + count
        tokens = self._tokens[: end * self._size]
        known = blocks.allocate(self._table, tokens, spare=self.engine.scheduler.num_running)
        if known is None:
            return False
        runner.move(Plan([], blocks.capacity, **blocks.drain()._asdict()))
        there = known // self._size
        if there >= first:
            pairs = [(index - first, self._table.blocks[index]) for index in range(there, end)]
            runner.take(data, count, pairs)
            blocks.register(self._table, tokens, len(tokens))
        blocks.free(self._table)
        return there >= first
