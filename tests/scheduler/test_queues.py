"""Both queues against plain sorting."""

from __future__ import annotations

from bisect import insort

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_llm.scheduler.queues import Rank, RankedList, RankedQueue

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "take", "first"]), st.integers(0, 9)), min_size=60, max_size=300
)


@pytest.mark.slow
@given(OPERATIONS)
def test_a_ranked_queue_is_a_sorted_list(operations: list[tuple[str, int]]) -> None:
    queue: RankedQueue[int] = RankedQueue()
    plain: list[tuple[Rank, int]] = []
    for step, (name, item) in enumerate(operations):
        inside = [entry for entry in plain if entry[1] == item]
        if name == "add" and not inside:
            rank = ((step * 7 % 5) / 2, item)
            queue.push(rank, item)
            insort(plain, (rank, item))
        elif name == "take":
            assert queue.discard(item) == bool(inside)
            plain = [entry for entry in plain if entry[1] != item]
        assert queue.first() == (plain[0] if plain else None)
        assert len(queue) == len(plain)


def test_what_leaves_a_queue_out_of_turn_does_not_pile_up() -> None:
    queue: RankedQueue[int] = RankedQueue()
    queue.push((0.0, 0), 0)
    for item in range(1, 10_000):
        queue.push((1.0, item), item)
        queue.discard(item)
    assert len(queue._heap) < 50


@pytest.mark.slow
@given(OPERATIONS)
def test_a_ranked_list_is_sorted(operations: list[tuple[str, int]]) -> None:
    ranked: RankedList[int] = RankedList()
    plain: list[Rank] = []
    for _, number in operations:
        rank = (number * 7 % 5 / 2, number)
        if rank in plain:
            plain.remove(rank)
            ranked.remove(rank)
        else:
            insort(plain, rank)
            ranked.add(rank, number)
        assert ranked.items == [number for _, number in plain]
