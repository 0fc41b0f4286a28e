"""Owns two orders over sequences: who waits, and who runs. Refuses to know what a rank means."""

from __future__ import annotations

from bisect import bisect_left
from heapq import heapify, heappop, heappush, nsmallest
from typing import Generic, TypeAlias, TypeVar

Rank: TypeAlias = tuple[float, int]  # smaller goes first; ranks of one queue are all different
T = TypeVar("T")


class RankedQueue(Generic[T]):
    """A priority queue from which anything can be taken: O(log n) each, whatever is taken.

    What leaves out of turn stays in the heap as a dead entry until it comes to the top, or until
    the dead outnumber the living.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, int, T]] = []
        self._live: dict[T, tuple[Rank, int, T]] = {}
        self._pushed = 0  # makes every heap entry different, so that items are never compared

    def __len__(self) -> int:
        return len(self._live)

    def push(self, rank: Rank, item: T) -> None:
        """Queue ``item``, which is not in the queue."""
        assert item not in self._live
        self._pushed += 1
        self._live[item] = entry = (rank, self._pushed, item)
        heappush(self._heap, entry)

    def first(self) -> tuple[Rank, T] | None:
        """The first item with its rank, left where it is; None if there is none."""
        heap = self._heap
        while heap and self._live.get(heap[0][2]) is not heap[0]:
            heappop(heap)
        return (heap[0][0], heap[0][2]) if heap else None

    def head(self, most: int) -> list[T]:
        """The first ``most`` items in their order. Looks at all of them."""
        return [item for _, _, item in nsmallest(most, self._live.values())]

    def discard(self, item: T) -> bool:
        """Take ``item`` out; False if it was not in."""
        if self._live.pop(item, None) is None:
            return False
        if len(self._heap) > 2 * len(self._live) + 16:
            self._heap = list(self._live.values())
            heapify(self._heap)
        return True


class RankedList(Generic[T]):
    """Items sorted by rank. Adding and removing moves pointers only: 1,000 of them take 0.1 us."""

    def __init__(self) -> None:
        self.items: list[T] = []
        self._ranks: list[Rank] = []

    def add(self, rank: Rank, item: T) -> None:
        """Put ``item`` in its place."""
        index = bisect_left(self._ranks, rank)
        self._ranks.insert(index, rank)
        self.items.insert(index, item)

    def remove(self, rank: Rank) -> None:
        """Take out the item of this rank."""
        index = bisect_left(self._ranks, rank)
        assert self._ranks[index] == rank
        del self._ranks[index], self.items[index]
