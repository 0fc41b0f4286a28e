"""Owns responses that were made, so that a request can go on from one: in memory, few, and not for long."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from tiny_llm.server.problems import Problem
from tiny_llm.server.response_bodies import AnyItem

MOST_BYTES = 2**26  # of all that is kept, as JSON; the least recently used go first
KEPT_S = 3600.0  # seconds since a response was used
_POINTER_BYTES = 8


class StoredResponse(NamedTuple):
    """A response as JSON, and the conversation that it answers: what came before, and what was asked."""

    salt: str
    response: bytes
    items: Sequence[AnyItem]
    size: int
    used_s: float


class StoredResponses:
    """Each belongs to the key that asked for it, whose ``salt`` it is kept with. Any thread may ask."""

    def __init__(
        self, most_bytes: int = MOST_BYTES, kept_s: float = KEPT_S, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._most_bytes = most_bytes
        self._kept_s = kept_s
        self._now = now
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()  # the least recently used first
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, salt: str, response_id: str, response: bytes, items: Sequence[AnyItem], asked: int) -> None:
        """Keep a response to ``asked`` bytes; one that is larger than all that may be kept is not."""
        size = len(response) + asked + _POINTER_BYTES * len(items)
        with self._lock:
            self._kept[response_id] = StoredResponse(salt, response, items, size, self._now())
            self._bytes += size
            self._shrink()

    def get(self, salt: str, response_id: str, param: str = "response_id") -> StoredResponse:
        """The response, used again. Raises Problem for one that is not kept, or is another key's."""
        with self._lock:
            self._shrink()
            found = self._kept.get(response_id)
            if found is None or found.salt != salt:
                what = (
                    f"{param}: no response {response_id[:80]!r} is kept. Those with store true are, for "
                    f"{self._kept_s:g} s after their last use, the last {self._most_bytes} bytes of all."
                )
                raise Problem(404, what, code="response_not_found", param=param)
            self._kept[response_id] = found._replace(used_s=self._now())
            self._kept.move_to_end(response_id)
            return found

    def remove(self, salt: str, response_id: str) -> None:
        """Forget a response. Raises as ``get`` does."""
        self.get(salt, response_id)
        with self._lock:
            self._drop(response_id)

    def _shrink(self) -> None:
        while self._kept:
            oldest = next(iter(self._kept))
            is_old = self._kept[oldest].used_s < self._now() - self._kept_s
            if not is_old and self._bytes <= self._most_bytes:
                return
            self._drop(oldest)

    def _drop(self, response_id: str) -> None:
        dropped = self._kept.pop(response_id, None)
        self._bytes -= 0 if dropped is None else dropped.size


def stored_routes(stored: StoredResponses) -> APIRouter:
    """What looks at one response, and what forgets it."""
    router = APIRouter(tags=["inference"])

    @router.get("/v1/responses/{response_id}", response_class=JSONResponse)
    async def response(request: Request, response_id: str) -> Response:
        found = stored.get(request.state.salt, response_id).response
        return Response(found, media_type="application/json")

    @router.delete("/v1/responses/{response_id}")
    async def deleted(request: Request, response_id: str) -> dict[str, Any]:
        stored.remove(request.state.salt, response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    return router
