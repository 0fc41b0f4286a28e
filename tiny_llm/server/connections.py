"""Owns who is let in: connections are accepted while files are left for them; the others wait.

asyncio's own server accepts until the system refuses, and writes a traceback each time that it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import Callable, Collection

from tiny_llm.server.protocol import DeadlineProtocol

MAX_CONNECTIONS = 4096
RESERVED_FILES = 64
"""For all that is no connection: files, pipes, the engine's own; half of them where there are few."""
IDLE_S = 1.0
"""How long who asks for nothing keeps others waiting."""
_PAUSE_S = 0.05
_LOG = logging.getLogger("tiny_llm.server")


def raise_file_limit() -> None:
    """Let this process open as many files as it may, up to what ``MAX_CONNECTIONS`` take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + RESERVED_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(ValueError, OSError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def max_connections() -> int:
    """How many connections the limit of files leaves room for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, max(soft // 2, soft - RESERVED_FILES)))


class Acceptor:
    """Accepts for ``make``'s protocols while fewer than ``most`` are in ``open_ones``.

    When all places are taken, the connection that has been idle longest makes room.
    """

    def __init__(
        self, make: Callable[[], DeadlineProtocol], open_ones: Collection[DeadlineProtocol], most: int
    ) -> None:
        self._make = make
        self._open = open_ones
        self._most = most
        self._is_said = False

    async def run(self, listening: socket.socket) -> None:
        """Accept until cancelled."""
        listening.setblocking(False)
        loop = asyncio.get_running_loop()
        while True:
            await self._room()
            try:
                accepted, _ = await loop.sock_accept(listening)
                await loop.connect_accepted_socket(self._make, accepted)
            except OSError as error:  # no descriptor is left, or the client is gone already
                self._say(f"A connection could not be accepted: {error}.")
                await asyncio.sleep(_PAUSE_S)

    async def _room(self) -> None:
        while len(self._open) >= self._most:
            self._say(f"{self._most} connections are open, which is the most; others wait.")
            idle = [one for one in self._open if one.idle_s >= IDLE_S]
            if idle:
                max(idle, key=lambda one: one.idle_s).shutdown()
            await asyncio.sleep(0 if idle else _PAUSE_S)

    def _say(self, what: str) -> None:
        """Once: whoever is overrun has no use for the same line a thousand times."""
        if not self._is_said:
            _LOG.warning("%s A higher `ulimit -n` lets more in. (This is said once.)", what)
        self._is_said = True
