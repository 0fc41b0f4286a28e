"""Owns what HTTP/1.1 itself can be wrong in: a request that trickles in, and bytes that are none.

uvicorn closes connections that idle between requests; this closes those that idle within one. What cannot be
parsed is refused by our application, like anything else, so that the refusal has all that others have.
"""

from __future__ import annotations

import asyncio
import re
import sys
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
