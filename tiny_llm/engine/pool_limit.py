"""Owns how many blocks the pool may have at the moment: what the operator allows, as far as memory is there.

Memory that was free at the start may be somebody else's when the pool wants to grow into it. So the machine
is asked again: when the pool has grown, and else once a second. What is left over is for a step's own arrays.
Where several models share a budget, a pool takes of it while a step is planned, and no other does meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tiny_llm.engine.budget import Share
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.memory import available_memory_bytes, give_back_memory
from tiny_llm.scheduler.scheduler import Scheduler

_ASK_EVERY_S = 1.0
_GIVEN_BACK_WITHIN_S = 1.0  # by another model, before somebody who runs gives way
_IDLE_S = 0.02  # then the engine looks again what it is to do

NO_MEMORY = (
    "There is no memory left for this request's keys and values: the pool cannot grow beyond {} blocks of "
    "{} tokens now. Try again later, or ask for less."
)
"""Told to who can never run: blocks that there may be, and tokens of a block."""


class PoolLimit:
    """A pool of at most ``most`` blocks of ``block_bytes``, which grows by ``slab`` blocks at a time.

    ``step_bytes`` are to be left for a step, but no more than a quarter of what there is at the start. The
    first slab is always allowed: without it nothing could run. Of a ``share`` it takes slabs.
    """

    def __init__(
        self,
        most: int,
        slab: int,
        block_bytes: int,
        step_bytes: int,
        clock: Callable[[], float],
        share: Share | None = None,
    ) -> None:
        self._share = share
        self._most = most
        self._slab = min(slab, most)
        self._block_bytes = block_bytes
        self._clock = clock
        self._reserve = min(step_bytes, available_memory_bytes() // 4)
        self._asked: tuple[int, int, float] | None = None  # the capacity then, what loads, and when that was
        self._limit = most

    def blocks(self, capacity: int, *, again: bool = False) -> int:
        """How many blocks there may be; ``capacity`` there are. Fewer, where others need the memory."""
        asked, now = self._asked, self._clock()
        if again or asked is None or asked[:2] != (capacity, self._loading) or now - asked[2] >= _ASK_EVERY_S:
            self._asked = capacity, self._loading, now
            self._limit = self._fitting(capacity)
        return self._limit

    @contextmanager
    def planning(self, scheduler: Scheduler) -> Iterator[None]:
        """Meanwhile the pool may grow by what its share leaves, and what it takes so is its own.

        First others are asked for what is missing. Where nobody can run, or one who runs would have to give
        way for want of what others are about to give back, that is waited for.
        """
        share, blocks, slab = self._share, scheduler.blocks, self._slab
        if share is None:
            yield
            return
        most = blocks.max_blocks
        running, starting = _wanted(scheduler)

        def missing(wanted: int) -> int:
            blocks.max_blocks = max(blocks.capacity, min(most, share.room * slab))
            return wanted - blocks.available

        changed = share.budget.changed
        with changed:
            more = missing(max(running, starting))
            share.ask(-(-(blocks.max_blocks + more) // slab) if more > 0 else 0)
            if more > 0 and not scheduler.num_running:
                changed.wait_for(lambda: missing(starting) <= 0, _IDLE_S)
            elif missing(running) > 0:
                changed.wait_for(lambda: missing(running) <= 0 or not share.may_come, _GIVEN_BACK_WITHIN_S)
            yield
            blocks.max_blocks = most
            self.note(blocks)

    def asked(self, blocks: BlockManager) -> tuple[int, int] | None:
        """What others leave of the pool: blocks that may be in use, and blocks that may stay if none are.

        None: it may stay as it is.
        """
        if self._share is None:
            return None
        with self._share.budget.changed:
            used, most = self._share.most_used * self._slab, self._share.unasked * self._slab
        is_well = blocks.capacity_within(0) <= used and blocks.capacity_within(most) == blocks.capacity
        return None if is_well else (used, most)

    def note(self, blocks: BlockManager) -> None:
        """Tell those who share the budget how large the pool is, and how much of it could go."""
        if self._share is not None:
            self._share.note(blocks.capacity // self._slab, blocks.capacity_within(0) // self._slab)

    def close(self) -> None:
        """The pool is gone."""
        if self._share is not None:
            self._share.close()

    def _fitting(self, capacity: int) -> int:
        more = self._room()
        # Before the pool stands still or shrinks, what is kept for later goes.
        if more < min(self._slab, self._most - capacity):
            give_back_memory()
            more = self._room()
        return min(self._most, max(capacity + more, self._slab))

    def _room(self) -> int:
        return (available_memory_bytes() - self._loading - self._reserve) // self._block_bytes

    @property
    def _loading(self) -> int:
        return 0 if self._share is None else self._share.budget.loading


def _wanted(scheduler: Scheduler) -> tuple[int, int]:
    """Blocks that those who run need to go on, and the first that waits to start beside them."""
    blocks, running = scheduler.blocks, scheduler.running()
    growing = sum(len(seq.tokens) > table.writable for seq, table in running)
    first = scheduler.waiting(int(len(running) < scheduler.settings.max_num_seqs))
    return growing, sum(blocks.blocks_for(len(seq.tokens)) + len(running) for seq in first)
