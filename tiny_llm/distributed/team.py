"""The ranks of one model as each of them sees the others: arrays by a group, plans and facts by links.

Rank 0 leads: what it tells, the others do. One that is lost ends it for all, with one reason: a collective
may wait for ever, and a plan may be long in coming, so a thread listens for who still lives.
"""

from __future__ import annotations

import atexit
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

from tiny_llm.distributed.links import Link
from tiny_llm.distributed.messages import Leave, Order, Told, read, written
from tiny_llm.distributed.mlx_group import MlxGroup
from tiny_llm.distributed.socket_group import SocketGroup
from tiny_llm.errors import GroupError

_REASON_S = 1.0
_LEAVE_S = 5.0
"""For who waits to be told, before a process ends that MLX does not let go; and for a child to leave."""


class Team:
    """Ranks that have met: ``plans`` and ``watched`` lead to rank 0, or from there to all others.

    ``children`` are processes that rank 0 has started, and ends.
    """

    def __init__(
        self,
        group: SocketGroup | MlxGroup,
        plans: Mapping[int, Link],
        watched: Mapping[int, Link],
        timeout_s: float,
        children: Sequence[subprocess.Popen[bytes]] = (),
    ) -> None:
        self.group = group
        self.rank, self.size = group.rank, group.size
        self.shares: tuple[float, ...] | None = None  # of a pipeline
        self.fault: str | None = None
        self._over = threading.Event()
        self.numbers = count()  # of the engines that are led
        self.gone: list[int] = []  # of these, such as nobody uses any more
        self._plans = plans
        self._children = children
        self._when_broken: list[Callable[[str], None]] = []
        self._is_open = True
        for link in plans.values():
            link.socket.settimeout(None)  # a plan may be long in coming: the watch says when it is too long
        self._watch = Watch(watched, timeout_s, self._break)
        self._watch.start()  # once there is one to tell the others by
        atexit.register(self.close)

    def share(self, mine: Any) -> list[Any]:
        """What each rank has said here, by rank: plain values, of a size for people to read."""
        if self.rank:
            self._plans[0].send(written(mine))
            return list(read(self._received(0), list))
        all_said = [mine, *(read(self._received(rank), object) for rank in sorted(self._plans))]
        for link in self._plans.values():
            link.send(written(all_said))
        return all_said

    def agree(self, facts: Mapping[str, object]) -> None:
        """Raises GroupError, on all ranks, for a fact that is another one elsewhere."""
        first, *others = self.share({name: str(fact) for name, fact in facts.items()})
        for rank, other in enumerate(others, 1):
            for name in [*first, *other]:
                if first.get(name) != other.get(name):
                    raise GroupError(
                        f"Rank {rank} has {name} {other.get(name)}, but rank 0 {first.get(name)}: all ranks "
                        "must be started alike, with the same model."
                    )

    def tell(self, message: Order) -> None:
        """Rank 0: let all others do this."""
        data = written(message)
        for link in self._plans.values():
            link.send(data)

    def hear(self) -> Told:
        """Others: what to do next."""
        told: Told = read(self._received(0), Told)
        return told

    def why(self, error: GroupError) -> str:
        """What stands behind an error: a link may be gone a moment before its reason has come."""
        self._over.wait(_REASON_S)
        return self.fault or str(error)

    def _received(self, rank: int) -> bytearray:
        try:
            return self._plans[rank].receive()
        except GroupError as error:
            raise GroupError(self.why(error)) from None

    def when_broken(self, call: Callable[[str], None]) -> None:
        """``call`` with the reason when the team is over by a fault, on whatever thread notices it."""
        self._when_broken.append(call)
        if self.fault is not None:
            call(self.fault)

    def give_up(self, why: str) -> None:
        """Tell the others that this rank cannot go on."""
        self._watch.tell(why)
        self._break(why)

    def close(self) -> None:
        """Leave: rank 0 takes the others with it. May be repeated."""
        if not self._is_open:
            return
        self._is_open = False
        atexit.unregister(self.close)
        if not self.rank and self.fault is None:
            with suppress(GroupError):
                self.tell(Leave(0))
        self._watch.close()
        for link in self._plans.values():
            link.socket.close()
        self.group.close()
        for child in self._children:
            end(child, _LEAVE_S if self.fault is None else 0.0)

    def _break(self, why: str) -> None:
        if self.fault is not None or not self._is_open:
            return
        self.fault = why
        self._over.set()
        if not self.rank:
            self._watch.tell(why)
        for link in self._plans.values():
            link.abort(why)
        self.group.abort(why)
        for call in self._when_broken:
            call(why)
        if isinstance(self.group, MlxGroup):  # whose collectives nothing ends
            threading.Thread(target=self._leave_process, daemon=True).start()

    def _leave_process(self) -> None:
        time.sleep(_LEAVE_S)
        print(f"error: {self.fault}", file=sys.stderr, flush=True)
        os._exit(1)


def end(child: subprocess.Popen[bytes], patience_s: float = 0.0) -> None:
    """Let a process leave by itself for so long, then end it."""
    try:
        child.wait(patience_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


_BEATS = 8  # in the time that may pass without one
_PATIENCE = 0.75  # of that time, so that all is said and done within it
_BYE = b"\0bye"


class Watch:
    """Over ``links`` to ranks, by rank, once it is started. ``on_fault`` is called once, on its thread, with
    what is wrong."""

    def __init__(self, links: Mapping[int, Link], timeout_s: float, on_fault: Callable[[str], None]) -> None:
        self._links, self._all = dict(links), list(links.values())
        self._timeout_s = timeout_s
        self._on_fault = on_fault
        self._ended = threading.Event()
        self._heard = dict.fromkeys(links, time.monotonic())
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)

    def start(self) -> None:
        """Begin. Before that, nobody may be told of a fault."""
        self._thread.start()

    def tell(self, what: str) -> None:
        """Tell the others that this rank ends, and why."""
        for link in list(self._links.values()):  # its thread takes those out that leave
            with suppress(GroupError):
                link.send(what.encode())

    def close(self) -> None:
        """This rank leaves, and nothing is wrong."""
        self._ended.set()
        self.tell(_BYE.decode())
        for link in self._all:
            link.abort("closed")
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for link in self._all:
            link.socket.close()

    def _work(self) -> None:
        try:
            while self._links and not self._ended.is_set():
                for link in self._links.values():
                    link.send(b"")
                self._listen(time.monotonic() + self._timeout_s / _BEATS)
        except GroupError as error:
            if not self._ended.is_set():
                self._on_fault(str(error))

    def _listen(self, until: float) -> None:
        """Take in what comes until then. Raises GroupError for a rank that ends, or has not said anything."""
        poll, by_file = select.poll(), {link.socket.fileno(): rank for rank, link in self._links.items()}
        for file in by_file:
            poll.register(file, select.POLLIN)
        while self._links and (left := until - time.monotonic()) > 0:
            for file, _ in poll.poll(1e3 * left):
                self._take(by_file[file])
                if by_file[file] not in self._links:
                    poll.unregister(file)
        for rank, heard in self._heard.items():
            silent = time.monotonic() - heard
            if rank in self._links and silent > _PATIENCE * self._timeout_s:
                raise GroupError(
                    f"Rank {rank} has not been heard of for {silent:.1f} s (--rank-timeout "
                    f"{self._timeout_s:g}): it has stopped, or cannot be reached."
                )

    def _take(self, rank: int) -> None:
        said = bytes(self._links[rank].receive())
        self._heard[rank] = time.monotonic()
        if said == _BYE:
            del self._links[rank]
        elif said:
            raise GroupError(f"Rank {rank}: {said.decode(errors='replace')}")
