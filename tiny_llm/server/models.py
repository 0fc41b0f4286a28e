"""Owns several models at one address: which one a request is for; loaded when asked for, unloaded when idle.

Each has a service and routes of its own, as one alone has. What names none is for the first one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from urllib.parse import parse_qs

from pydantic_core import from_json
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tiny_llm.engine.budget import MemoryBudget
from tiny_llm.errors import TinyLLMError, did_you_mean
from tiny_llm.memory import available_memory_bytes
from tiny_llm.server.app import create_app, model_card
from tiny_llm.server.guard import replayed
from tiny_llm.server.problems import Problem, problem_of
from tiny_llm.server.service import Service
from tiny_llm.server.stored import StoredResponses

_CARDS = "/v1/models"
_PEEKED_BYTES = 2**16  # of a body that is read here; of a larger one in a thread
_LOG = logging.getLogger("tiny_llm.server")


class _Resident:
    """A model's service and routes, how many requests use them, and when the last one ended."""

    def __init__(self, service: Service, stored: StoredResponses) -> None:
        self.service = service
        self.app: ASGIApp = create_app(service, stored)
        self.loading = asyncio.Lock()
        self.users = 0
        self.idle_since = 0.0


class Models:
    """An application of all ``services``. One that nobody uses for ``unload_after_s`` is unloaded.

    What one is about to take is promised to no other that loads, and no pool of ``budget`` grows into it.
    Where memory does not suffice, those that nobody uses make room, the longest unused first.
    """

    def __init__(
        self,
        services: Sequence[Service],
        unload_after_s: float | None = None,
        budget: MemoryBudget | None = None,
    ) -> None:
        stored = StoredResponses()
        self._all = [_Resident(service, stored) for service in services]
        self._unload_after_s = unload_after_s
        self._budget = budget or MemoryBudget(0, len(services))
        self._choosing = asyncio.Lock()  # who makes room
        self._resting = set[asyncio.Task[None]]()  # who sleeps until it may be time

    def problem(self) -> Problem | None:
        """Why no request can be served now, whichever model it is for."""
        first = self._all[0].service
        return first.problem() if first.state in ("loading", "draining") else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by the routes of the model that is asked for."""
        if scope["path"] == _CARDS and scope["method"] == "GET":
            cards = [model_card(one.service) for one in self._all]
            return await JSONResponse({"object": "list", "data": cards})(scope, receive, send)
        asked = None
        if scope["method"] == "POST":
            message = await receive()
            asked, receive = await _asked(message.get("body", b"")), replayed(message, receive)
        try:
            one = self._named(asked or _named_in_address(scope))
        except Problem as problem:
            return await problem.response(scope["path"])(scope, receive, send)
        one.users += 1
        try:
            if scope["method"] == "POST":
                await self._load(one)
            await one.app(scope, receive, send)
        except Problem as problem:
            await problem.response(scope["path"])(scope, receive, send)
        finally:
            one.users -= 1
            self._rest_later(one)

    def _named(self, asked: str | None) -> _Resident:
        """The model of that name. Raises Problem where there is none."""
        if asked is None:
            return self._all[0]
        for one in self._all:
            if one.service.is_called(asked):
                return one
        names = [one.service.settings.name for one in self._all]
        what = f"The model {asked[:200]!r} is not served here; {', '.join(map(repr, names))} are."
        raise Problem(404, what + did_you_mean(asked[:200], names), code="model_not_found", param="model")

    async def _load(self, one: _Resident) -> None:
        """Have it loaded. Raises Problem where that cannot be."""
        async with one.loading:
            if one.service.state != "unloaded":
                return
            need = one.service.weight_bytes + self._budget.slab_bytes
            async with self._choosing:
                await self._make_room(one, need)
                self._budget.loading += need
            try:
                await one.service.start()
            except TinyLLMError as error:
                what = f"{one.service.settings.name} cannot be loaded: {problem_of(error).detail}"
                raise Problem(503, what, code="load_failed") from error
            finally:
                self._budget.loading -= need
            _LOG.info("%s is loaded", one.service.settings.name)

    async def _make_room(self, one: _Resident, need: int) -> None:
        """Unload what nobody uses, until there is memory for it. Raises Problem where that is too little."""
        idle = sorted((other for other in self._all if self._is_idle(other)), key=lambda o: o.idle_since)
        while need > (free := available_memory_bytes() - self._budget.loading):
            if not idle:
                what = (
                    f"{one.service.settings.name} needs {need / 1e9:.1f} GB to be loaded, but "
                    f"{max(0, free) / 1e9:.1f} are free, and the other models are in use."
                )
                raise Problem(503, what, code="no_memory")
            await self._rest(idle.pop(0))

    def _is_idle(self, one: _Resident) -> bool:
        return one.users == 0 and one.service.state == "ready"

    def _rest_later(self, one: _Resident) -> None:
        """Unload it when nobody has used it for long enough."""
        loop = asyncio.get_running_loop()
        one.idle_since = since = loop.time()
        if self._unload_after_s is None or one.users:
            return

        async def rest(after_s: float) -> None:
            await asyncio.sleep(after_s)
            if one.idle_since == since:
                async with self._choosing:
                    await self._rest(one)

        resting = loop.create_task(rest(self._unload_after_s))
        self._resting.add(resting)
        resting.add_done_callback(self._resting.discard)

    async def _rest(self, one: _Resident) -> None:
        if self._is_idle(one):
            await one.service.rest()
            _LOG.info("%s is unloaded", one.service.settings.name)


async def _asked(body: bytes) -> str | None:
    """The model that a body names; what is wrong with the body is the routes' to say."""

    def read() -> str | None:
        try:
            value = from_json(body, allow_inf_nan=False)
        except ValueError:
            return None
        model = value.get("model") if isinstance(value, dict) else None
        return model if isinstance(model, str) else None

    return read() if len(body) <= _PEEKED_BYTES else await asyncio.to_thread(read)


def _named_in_address(scope: Scope) -> str | None:
    """As /v1/models/NAME, or behind a question mark: /metrics?model=NAME."""
    if scope["path"].startswith(f"{_CARDS}/"):
        return str(scope["path"]).removeprefix(f"{_CARDS}/")
    given = parse_qs(scope["query_string"].decode("latin-1")).get("model")
    return given[0] if given else None
