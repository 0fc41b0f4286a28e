"""Owns connections: who is let in, and what HTTP/1.1 itself can be wrong in.

Connections are accepted while files are left for them; the others wait: asyncio's own server accepts until
the system refuses, and writes a traceback each time that it does. uvicorn closes connections that idle
between requests; this closes those that idle within one. What cannot be parsed is refused by our application,
like anything else, so that the refusal has all that others have.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import resource
import socket
import sys
from collections.abc import Callable, Collection
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tiny_llm.server.problems import Problem

_FOR_A_REFUSAL = re.compile(rb"\r\n(origin|x-request-id):([ -~]{1,256})(?=\r\n\S)", re.IGNORECASE)
"""The headers that change how a refusal looks."""


class DeadlineProtocol(H11Protocol):
    """HTTP/1.1 whose requests arrive within ``read_timeout_s``, headers and body, or not at all."""

    read_timeout_s = 30.0
    _deadline: asyncio.TimerHandle | None = None
    _heard_s = 0.0
    _is_refused = False

    @classmethod
    def within(cls, seconds: float) -> type[DeadlineProtocol]:
        """This protocol with another deadline."""
        return type("Protocol", (cls,), {"read_timeout_s": seconds})

    def connection_made(self, transport: Any) -> None:
        """A client is there: its first request is awaited."""
        super().connection_made(transport)
        self._heard_s = self.loop.time()
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        """A client is gone."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request, perhaps its last."""
        self._heard_s = self.loop.time()
        if self._is_refused:  # the rest of what is no request
            return
        super().data_received(data)
        half_sent = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
        if half_sent or self.conn.their_state is h11.SEND_BODY:
            self._start()
        else:
            self._stop()

    def on_response_complete(self) -> None:
        """A request is answered: the next one is awaited."""
        self._heard_s = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Have the application refuse what h11 has just raised an error for, as if it had been a request."""
        self._is_refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its request will never be whole
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is half sent
            self.transport.close()
            return
        seen = _FOR_A_REFUSAL.findall(self.conn.trailing_data[0])
        request = [b"GET / HTTP/1.0", *(name + b":" + value for name, value in seen), b"", b""]
        self.app_state = {"problem": _problem_of(sys.exception())}
        self.conn = h11.Connection(h11.SERVER)
        self.conn.receive_data(b"\r\n".join(request))
        self.handle_events()

    @property
    def idle_s(self) -> float:
        """Seconds since anything came or went; 0 while a request is under way, or once it closes."""
        if self.transport.is_closing() or (self.cycle is not None and not self.cycle.response_complete):
            return 0.0
        return self.loop.time() - self._heard_s

    def _start(self) -> None:
        if self._deadline is None:  # the first byte counts, not the latest
            self._deadline = self.loop.call_later(self.read_timeout_s + 1, self.transport.abort)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _problem_of(error: BaseException | None) -> Problem:
    """What h11 raises, without its words: they are about its insides."""
    status = getattr(error, "error_status_hint", 400)
    if status == 431:
        return Problem(431, "The request line and the headers are too large.")
    return Problem(400, "What was sent is no valid HTTP/1.1 request.", code="invalid_http")


MAX_CONNECTIONS = 4096
RESERVED_FILES = 64
"""For all that is no connection: files, pipes, the engine's own; half of them where there are few."""
IDLE_S = 1.0  # how long who asks for nothing keeps others waiting
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
