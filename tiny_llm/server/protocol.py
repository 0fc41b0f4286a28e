"""Owns the deadline for a request that trickles in: headers that never end, a body nobody reads.

uvicorn closes connections that idle between requests; this closes those that idle within one.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class DeadlineProtocol(H11Protocol):
    """HTTP/1.1 whose requests arrive within ``read_timeout_s``, headers and body, or not at all."""

    read_timeout_s = 30.0
    _deadline: asyncio.TimerHandle | None = None
    _heard_s = 0.0

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
