"""Owns the accounts of a pool without pages, as servers had it before: each sequence's tokens lie in one run.

Room is kept for all that a sequence may come to, from its start to its end. No engine has it.
Source: Kwon et al. 2023, PagedAttention, section 3.1 and the baselines of section 6.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from sys import maxsize
from typing import Literal, cast

from tiny_llm.kv.block_table import BlockTable
from tiny_llm.kv.blocks import BlockManager, Usage

Memory = Literal["paged", "first", "best", "buddy"]
Reserve = Literal["exact", "pow2", "max"]


class Run(BlockTable):
    """A sequence's tokens in one run of ``size`` slots."""

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        super().__init__(b"")
        self.size = size


class ContiguousBlocks(BlockManager):
    """Hands out runs of slots: a block is one slot. What is kept for an answer is its very length, that
    rounded up to a power of two, or what reaches the ``longest``. "buddy" takes powers of two, each where
    a multiple of its size begins."""

    def __init__(self, slots: int, fit: Memory, reserve: Reserve, longest: int) -> None:
        super().__init__(1, slots, prefix_cache=False)
        self._fit, self._reserve, self._longest = fit, reserve, longest
        self._holes = [(0, slots)]  # (start, size), in order; no two touch

    @property
    def capacity(self) -> int:
        """All slots."""
        return self.max_blocks

    @property
    def available(self) -> int:
        """Slots of all holes."""
        return sum(size for _, size in self._holes)

    def table(self, salt: str = "", *, is_kept: bool = True, keeps_all: bool = False) -> BlockTable:
        """For a sequence whose ``salt`` says how long prompt and answer will be; nothing is shared."""
        prompt, answer = map(int, salt.split())
        kept = {"exact": answer, "pow2": _power(answer), "max": max(answer, self._longest - prompt)}
        size = prompt + kept[self._reserve]
        return Run(_power(size) if self._fit == "buddy" else size)

    def most_blocks(self, table: BlockTable, tokens: int, ahead: int) -> int:
        """Slots that it will be given."""
        return cast(Run, table).size

    def would_fit(self, table: BlockTable, tokens: Sequence[int], ahead: int = maxsize) -> bool:
        """Whether there is a hole for it."""
        return self._hole(cast(Run, table).size) is not None

    def allocate(
        self, table: BlockTable, tokens: Sequence[int], *, spare: int = 0, ahead: int = maxsize
    ) -> int | None:
        """Give it its run; None where no hole is large enough. Nothing is found that was there before."""
        size = cast(Run, table).size
        found = self._hole(size)
        if found is None:
            return None
        index, start = found
        hole, length = self._holes[index]
        parts = ((hole, start - hole), (start + size, hole + length - start - size))
        self._holes[index : index + 1] = [part for part in parts if part[1]]
        table.blocks = cast("array[int]", range(start, start + size))  # sliced as an array is, and no larger
        table.writable = size
        return 0

    def free(self, table: BlockTable, tokens: Sequence[int] = (), computed: int = 0) -> None:
        """Take the run back, and join it to the holes beside it."""
        if not table.blocks:
            return
        start, end = table.blocks[0], table.blocks[-1] + 1
        index = bisect_left(self._holes, (start, 0))
        first = last = index
        if first and sum(self._holes[first - 1]) == start:
            first -= 1
            start = self._holes[first][0]
        if last < len(self._holes) and self._holes[last][0] == end:
            end = sum(self._holes[last])
            last += 1
        self._holes[first:last] = [(start, end - start)]
        table.blocks = array("i")
        table.writable = 0

    def swap_out(self, table: BlockTable, computed: int) -> bool:
        """Never: nobody makes room for others."""
        return False

    def usage(self, held: Iterable[tuple[BlockTable, int]], pinned: int = 0) -> Usage:
        """The accounts, in slots."""
        used = self.capacity - self.available
        wasted = used - sum(computed for _, computed in held)
        return Usage(self.capacity, self.capacity, used, 0, self.available, wasted, 0, pinned)

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Assert that runs and holes lie side by side, and together are the pool."""
        runs = [(table.blocks[0], len(table.blocks)) for table in tables if table.blocks]
        end = 0
        for start, size in sorted([*runs, *self._holes]):
            assert start == end, "two overlap, or slots are lost"
            end = start + size
        assert end == self.capacity

    def _hole(self, size: int) -> tuple[int, int] | None:
        """Which hole takes a run of ``size``, and where that begins."""
        best: tuple[int, int, int] | None = None
        for index, (start, length) in enumerate(self._holes):
            place = -(-start // size) * size if self._fit == "buddy" else start
            if place + size > start + length:
                continue
            if self._fit != "best":
                return index, place
            best = min(best or (length, index, place), (length, index, place))
        return best and best[1:]


def _power(count: int) -> int:
    """The power of two from ``count`` on."""
    return 1 << (count - 1).bit_length()
