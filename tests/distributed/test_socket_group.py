"""Groups over sockets: what is gathered, and what is said when a rank is gone, slow, or somewhere else."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import TypeVar

import mlx.core as mx
import pytest

from tiny_llm.distributed.group import ALONE
from tiny_llm.distributed.socket_group import SocketGroup
from tiny_llm.errors import GroupError

T = TypeVar("T")


def groups(size: int, timeout_s: float = 20.0) -> list[SocketGroup]:
    """The ranks of one group, in this process."""
    ends: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    for a, b in combinations(range(size), 2):
        ends[a][b], ends[b][a] = socket.socketpair()
    return [SocketGroup(rank, sockets, timeout_s) for rank, sockets in enumerate(ends)]


@pytest.fixture(params=[2, 3, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[list[SocketGroup]]:
    made = groups(request.param)
    yield made
    for one in made:
        one.close()


def on_all(ranks: list[SocketGroup], work: Callable[[SocketGroup], T]) -> list[T]:
    """What each rank's thread gives. The arrays are its own: MLX's streams belong to a thread."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(work, ranks))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int8, mx.uint32, mx.bool_])
def test_what_is_gathered_lies_by_rank_bit_for_bit(ranks: list[SocketGroup], dtype: mx.Dtype) -> None:
    def own(rank: int) -> mx.array:
        return (mx.random.normal((3, 5), key=mx.random.key(rank)) * 100).astype(dtype)

    expected = mx.concatenate([own(rank) for rank in range(len(ranks))]).tolist()
    assert on_all(ranks, lambda group: group.all_gather(own(group.rank)).tolist()) == [expected] * len(ranks)


def test_many_after_each_other_stay_apart(ranks: list[SocketGroup]) -> None:
    def work(group: SocketGroup) -> list[object]:
        return [group.all_gather(mx.array([[n, group.rank]])).tolist() for n in range(50)]

    expected = [[[n, rank] for rank in range(len(ranks))] for n in range(50)]
    assert on_all(ranks, work) == [expected] * len(ranks)


def test_much_goes_both_ways_at_once(ranks: list[SocketGroup]) -> None:
    """Ten times what a socket's buffers hold: whoever sent all of it first would wait for ever."""
    large = 2_000_000

    def work(group: SocketGroup) -> object:
        gathered = group.all_gather(mx.full((large,), group.rank, mx.int8))
        return gathered.reshape(group.size, large).sum(axis=1).tolist()

    assert on_all(ranks, work) == [[large * rank for rank in range(len(ranks))]] * len(ranks)


def test_of_nothing_nothing_is_sent_and_it_still_depends_on_what_it_came_of() -> None:
    first, _ = groups(2)
    asked = mx.zeros((4, 6))
    gathered = first.all_gather(asked[mx.array([], mx.int32)])  # nobody answers, and nobody need
    assert gathered.shape == (0, 6)


def test_a_part_goes_to_one(ranks: list[SocketGroup]) -> None:
    def work(group: SocketGroup) -> list[float]:
        mine = mx.array([1.5, 2.5])
        before = group.receive((2,), mx.float32, group.rank - 1) if group.rank else mine
        if group.rank + 1 < group.size:
            group.send(before + 1, group.rank + 1)
        return before.tolist()  # type: ignore[return-value]

    assert on_all(ranks, work) == [[1.5 + rank, 2.5 + rank] for rank in range(len(ranks))]


def test_one_alone_gathers_its_own() -> None:
    x = mx.array([1, 2])
    assert ALONE.size == 1 and ALONE.all_gather(x) is x


def test_a_rank_that_does_not_answer_is_named_when_the_time_is_over() -> None:
    first, *_ = groups(3, timeout_s=0.05)
    with pytest.raises(GroupError, match=r"Ranks 1, 2 did not answer within 0.05 s \(--rank-timeout\)"):
        first.all_gather(mx.zeros(4))
    with pytest.raises(GroupError, match="Ranks 1, 2 did not answer"):  # it stays so
        first.all_gather(mx.zeros(4))


def test_a_rank_that_hangs_up_is_named() -> None:
    first, other = groups(2)
    other.close()
    with pytest.raises(GroupError, match="Rank 1 is gone"):
        first.all_gather(mx.zeros(4))


def test_ranks_that_are_not_at_the_same_message_hear_of_it() -> None:
    first, other = groups(2)

    def work(group: SocketGroup) -> str:
        with pytest.raises(GroupError) as caught:
            group.all_gather(mx.zeros(4 + group.rank))
        return str(caught.value)

    assert any("they do not compute the same" in said for said in on_all([first, other], work))


def test_whoever_waits_hears_why_the_group_is_over() -> None:
    first, _ = groups(2)
    caught: list[str] = []

    def wait() -> None:
        with pytest.raises(GroupError) as error:
            first.all_gather(mx.zeros(4))
        caught.append(str(error.value))

    thread = threading.Thread(target=wait)
    thread.start()
    first.abort("Rank 1 stopped.")
    thread.join(20)
    assert caught == ["Rank 1 stopped."]
