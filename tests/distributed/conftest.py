"""What tests of several ranks share: ranks that are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, Queue
from typing import Any, TypeVar

import mlx.core as mx
import pytest

from tiny_llm.distributed.group import Group
from tiny_llm.ops.backend import use

T = TypeVar("T")
OnRanks = Callable[..., list[Any]]
_PATIENCE_S = 60


class ThreadGroup:
    """A rank that is a thread. What all give lies in ``table``, one place a rank, and what is for one of
    them in its ``mail``.
    """

    def __init__(
        self, rank: int, table: list[mx.array | None], meet: threading.Barrier, mail: list[Queue[mx.array]]
    ) -> None:
        self.rank, self.size, self._mail = rank, len(table), mail
        self.received = 0  # bytes from others
        self.gathers = 0
        self._table, self._meet = table, meet

    def all_gather(self, x: mx.array) -> mx.array:
        """Waits for all, twice: until they have given, and until they have taken."""
        mx.eval(x)
        self._table[self.rank] = x
        self._meet.wait()
        given = [one for one in self._table if one is not None]
        assert len({(one.shape, one.dtype) for one in given}) == 1, "ranks give different things"
        self.received += x.nbytes * (self.size - 1)
        self.gathers += 1
        whole = mx.concatenate(given)
        mx.eval(whole)
        self._meet.wait()
        return whole

    def send(self, x: mx.array, to: int) -> mx.array:
        """Lays it in the mail."""
        mx.eval(x)
        self._mail[to].put(x)
        return x

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype, source: int) -> mx.array:
        """Waits for it; there is one way only, from each rank to the one before it."""
        x = self._mail[self.rank].get(timeout=_PATIENCE_S)
        assert (x.shape, x.dtype) == (shape, dtype), "ranks speak of different things"
        self.received += x.nbytes
        return x


def _on_ranks(size: int, backend: str, call: Callable[[Group], T]) -> list[T]:
    table: list[mx.array | None] = [None] * size
    meet, mail = threading.Barrier(size, timeout=_PATIENCE_S), [Queue[mx.array]() for _ in range(size)]

    def run(rank: int) -> T:
        try:
            with mx.stream(mx.new_stream(mx.cpu)), use(backend):
                return call(ThreadGroup(rank, table, meet, mail))
        except BaseException:
            meet.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    failures = [e for e in (f.exception() for f in futures) if e is not None]
    for failure in failures:
        if not isinstance(failure, (threading.BrokenBarrierError, Empty)):
            raise failure
    return [future.result() for future in futures]


@pytest.fixture(scope="session")
def on_ranks() -> OnRanks:
    """``on_ranks(size, backend, call)``: what ``call(group)`` returns on each rank."""
    return _on_ranks
