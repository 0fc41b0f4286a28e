"""Owns GET /live: the engine's pictures as events, the same ones for all who watch.

A picture is taken when somebody waits for the next one, so none while nobody watches; and so seldom
that taking it is at most ``MAX_SHARE`` of the engine's time. Who reads slowly misses some.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from tiny_llm.server.events import event_of
from tiny_llm.server.picture import picture
from tiny_llm.server.problems import Problem
from tiny_llm.server.service import Service, with_first

PERIOD_S = 0.25
MAX_SHARE = 0.005
MAX_WATCHERS = 16


class Live:
    """The pictures of one service's engine."""

    def __init__(self, service: Service) -> None:
        self.watchers = 0
        self._service = service
        self._next: asyncio.Task[bytes] | None = None
        self._due = 0.0

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """Events until the watcher leaves or the server drains. Raises Problem if too many watch."""
        events = self._events()
        return with_first(await anext(events), events)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        if self.watchers >= MAX_WATCHERS:
            what = f"{MAX_WATCHERS} watch the engine already, which is the most."
            raise Problem(429, what, code="too_many_watchers")
        self.watchers += 1
        try:
            while not self._service.draining:
                if self._next is None or self._next.done():
                    self._next = asyncio.ensure_future(self._take())
                yield await asyncio.shield(self._next)
        finally:
            self.watchers -= 1
            if not self.watchers and self._next is not None:
                self._next.cancel()

    async def _take(self) -> bytes:
        """The next picture, when its time has come."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._due - loop.time())
        taken = await self._service.engine.call(lambda llm: picture(llm.engine))
        cost = taken["cost_s"]
        assert isinstance(cost, float)
        self._due = loop.time() + max(PERIOD_S, cost / MAX_SHARE)
        return event_of(taken)
