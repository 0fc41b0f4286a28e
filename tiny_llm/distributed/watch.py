"""Whether the other ranks still live: a thread that says so to them, and listens to them saying so.

A collective may wait for ever, and a plan may be long in coming: so this decides, not they.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from tiny_llm.distributed.links import Link
from tiny_llm.errors import GroupError

_BEATS = 8  # in the time that may pass without one
_PATIENCE = 0.75  # of that time, so that all is said and done within it
_BYE = b"\0bye"


class Watch:
    """Over ``links`` to ranks, by rank. ``on_fault`` is called once, on the thread, with what is wrong."""

    def __init__(self, links: Mapping[int, Link], timeout_s: float, on_fault: Callable[[str], None]) -> None:
        self._links, self._all = dict(links), list(links.values())
        self._timeout_s = timeout_s
        self._on_fault = on_fault
        self._ended = threading.Event()
        self._heard = dict.fromkeys(links, time.monotonic())
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
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
