"""Owns how much memory a pool of keys and values may have: of the machine, and of one that models share.

Memory that was free at the start may be somebody else's when a pool wants to grow into it. So the machine is
asked again: when the pool has grown, and else once a second. What is left over is for a step's own arrays.

Of the pools that share a memory each may always have an equal part. What it does not ask for of that, others
may hold until it does; then they give back first what no sequence uses, and at last what those use that came
last, which are computed again later. Beyond its part a model gets what is free and what nobody uses; who
asked first is served first. A pool takes of it while a step is planned, and no other does meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from threading import Condition

from tiny_llm.kv.blocks import BlockManager
from tiny_llm.memory import available_memory_bytes, give_back_memory, narrowest_limit
from tiny_llm.scheduler.scheduler import Scheduler

KV_SLAB_BYTES = 2**26  # a pool grows by this much at a time
_ASK_EVERY_S = 1.0
_GIVEN_BACK_WITHIN_S = 1.0  # by another model, before somebody who runs gives way
_IDLE_S = 0.02  # then the engine looks again what it is to do

NO_MEMORY = (
    "There is no memory left for this request's keys and values: the pool cannot grow beyond {} blocks of "
    "{} tokens now. Try again later, or ask for less."
)
"""Told to who can never run: blocks that there may be, and tokens of a block."""


class MemoryBudget:
    """``total`` bytes for the pools of ``models``. What is said of it is said under ``changed``.

    ``loading`` bytes of memory are promised to weights that are being read: no pool grows into them.
    """

    def __init__(self, total: int, models: int) -> None:
        self.total = total
        self.part = total // models
        self.slab_bytes = min(KV_SLAB_BYTES, self.part // 8)
        self.loading = 0
        self.changed = Condition()
        self.shares: list[Share] = []

    def share(self) -> Share:
        """One more model's. There are to be as many as there are parts."""
        self.shares.append(Share(self))
        return self.shares[-1]


class Share:
    """A pool's account in ``budget``, in bytes: what is ``held``, of that ``used``, and ``asked`` for.

    Its pool grows and shrinks by ``unit`` bytes. ``wake`` is called, on any thread, when others ask for what
    it holds, and is to have ``Engine.give_back`` called on the engine's.
    """

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        self.unit = 1
        self.close()

    def open(self, unit: int) -> int:
        """Begin with an empty pool; return how many units there can ever be.

        No more than half of the machine's, so that where mapped memory counts not all is mapped by one.
        """
        self.unit = unit
        self.close()
        return min(self.budget.total, max(self.part, narrowest_limit().most // 2)) // unit

    def close(self) -> None:
        """There is no pool: nothing is held, and nothing asked for."""
        with self.budget.changed:
            self.part = self.budget.part // self.unit * self.unit
            self.held = self.used = self.asked = 0
            self.since = inf
            self.wake: Callable[[], object] = lambda: None
            self.budget.changed.notify_all()

    def note(self, held: int, used: int) -> None:
        """So many units are held and used now: never more held than ``room``."""
        with self.budget.changed:
            self.held, self.used = held * self.unit, used * self.unit
            self.budget.changed.notify_all()

    def ask(self, units: int) -> None:
        """It is to hold so many in all, and they are not there; 0: nothing is missing."""
        self.since = inf if not units else min(self.since, time.monotonic())
        self.asked = units * self.unit
        for one in self._others if units else ():
            if one.held:
                one.wake()

    @property
    def room(self) -> int:
        """Units that the pool may have now."""
        free = self.budget.total - sum(one.held for one in self._others)
        return min(free, max(self.part, self._left())) // self.unit

    @property
    def unasked(self) -> int:
        """Units that it may keep of those that no sequence uses."""
        return max(0, self._left()) // self.unit

    @property
    def most_used(self) -> int:
        """Units that sequences may keep: nothing of another's part that it asks for."""
        others = sum(max(one.used, min(one.part, one.asked)) for one in self._others)
        return max(self.part, self.budget.total - others) // self.unit

    @property
    def may_come(self) -> bool:
        """Whether others are to give something back."""
        return any(
            one.held > max(min(one.used, one.unit * one.most_used), one.unit * one.unasked)
            for one in self._others
        )

    @property
    def _others(self) -> list[Share]:
        return [one for one in self.budget.shares if one is not self]

    def _left(self) -> int:
        """What nobody else holds or asks for: of its part, or beyond it, where it has asked for longer."""
        asked = (one.asked if one.since < self.since else min(one.part, one.asked) for one in self._others)
        return self.budget.total - sum(map(max, asked, [one.held for one in self._others]))


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
