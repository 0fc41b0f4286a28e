"""Owns how many blocks the pool may have at the moment: what the operator allows, as far as memory is there.

Memory that was free at the start may be somebody else's when the pool wants to grow into it. So the machine
is asked again: when the pool has grown, and else once a second. What is left over is for a step's own arrays.
"""

from __future__ import annotations

from collections.abc import Callable

from tiny_llm.memory import available_memory_bytes, give_back_memory

_ASK_EVERY_S = 1.0

NO_MEMORY = (
    "There is no memory left for this request's keys and values: the pool cannot grow beyond {} blocks of "
    "{} tokens now. Try again later, or ask for less."
)
"""Told to who can never run: blocks that there may be, and tokens of a block."""


class PoolLimit:
    """A pool of at most ``most`` blocks of ``block_bytes``, which grows by ``slab`` blocks at a time.

    ``step_bytes`` are to be left for a step, but no more than a quarter of what there is at the start. The
    first slab is always allowed: without it nothing could run.
    """

    def __init__(
        self, most: int, slab: int, block_bytes: int, step_bytes: int, clock: Callable[[], float]
    ) -> None:
        self._most = most
        self._slab = min(slab, most)
        self._block_bytes = block_bytes
        self._clock = clock
        self._reserve = min(step_bytes, available_memory_bytes() // 4)
        self._asked: tuple[int, float] | None = None  # the capacity then, and when that was
        self._limit = most

    def blocks(self, capacity: int, *, again: bool = False) -> int:
        """How many blocks there may be; ``capacity`` there are. Fewer, where others need the memory."""
        now = self._clock()
        if again or self._asked is None or self._asked[0] != capacity or now - self._asked[1] >= _ASK_EVERY_S:
            self._asked = capacity, now
            self._limit = self._fitting(capacity)
        return self._limit

    def _fitting(self, capacity: int) -> int:
        more = self._room()
        # Before the pool stands still or shrinks, what is kept for later goes.
        if more < min(self._slab, self._most - capacity):
            give_back_memory()
            more = self._room()
        return min(self._most, max(capacity + more, self._slab))

    def _room(self) -> int:
        return (available_memory_bytes() - self._reserve) // self._block_bytes
