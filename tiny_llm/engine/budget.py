"""Owns one memory for the keys and values of several models: what each pool holds, and what it may have.

Each may always have an equal part. What it does not ask for of that, others may hold until it does; then they
give back first what no sequence uses, and at last what those use that came last, which are computed again
later. Beyond its part a model gets what is free and what nobody uses; who asked first is served first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from threading import Condition

from tiny_llm.memory import narrowest_limit

KV_SLAB_BYTES = 2**26  # a pool grows by this much at a time


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
