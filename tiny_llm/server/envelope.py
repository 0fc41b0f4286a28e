"""Owns what a request and its response have around them, whatever is asked: an id, and HTTP's own forms.

Goes around the guard, so that a refusal has them too. Knows no route.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from urllib.parse import unquote

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiny_llm.memory import trim_heap

LARGE_BYTES = 2**20  # of a request and its response: what they took goes back to the system after it
_GOOD_ID = re.compile(rb"[!-~]{1,128}")  # printable, so that it may stand in a log line
_LOG = logging.getLogger("tiny_llm.server")


class Envelope:
    """Wraps ``app``: takes a request's id or makes one, returns it as X-Request-Id, logs what came of it.

    HEAD is answered as GET is, without the body. A target may be whole, as a proxy gets it: http://host/path;
    or, of OPTIONS, the server: *.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope = _with_path_alone(scope)
        request_id = _request_id(scope)
        scope["state"] = {**scope.get("state", {}), "request_id": request_id.decode()}
        began, is_head, headers_only = time.monotonic(), scope["method"] == "HEAD", False
        sent = 0

        async def enveloped(message: Message) -> None:
            nonlocal headers_only, sent
            if headers_only:  # a stream may go on, until it sees that its reader has all that it asked for
                return
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
                took = time.monotonic() - began
                what = "%s %s %s: %d after %.3f s"
                path = scope["raw_path"].decode("ascii", "replace")
                _LOG.info(what, request_id.decode(), scope["method"], path, message["status"], took)
            sent += len(message.get("body", b""))
            await send(message)
            if is_head:
                headers_only = True
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        method = "GET" if is_head else scope["method"]
        app = self._app
        if method == "OPTIONS" and scope["raw_path"] == b"*":  # of no route, of all: RFC 9110, 9.3.7
            app = Response(status_code=204, headers={"Allow": "GET, HEAD, POST, OPTIONS"})
        await app({**scope, "method": method}, receive, enveloped)
        if sent + scope["state"].get("body_bytes", 0) > LARGE_BYTES:
            await asyncio.to_thread(trim_heap)


def _request_id(scope: Scope) -> bytes:
    """The client's own id, if it is one that can be logged."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _GOOD_ID.fullmatch(given[0]):
        return bytes(given[0])
    return b"req-" + secrets.token_hex(16).encode()


def _with_path_alone(scope: Scope) -> Scope:
    """The request of a whole target: its host goes before the header's (RFC 9112, 3.2.2)."""
    scheme, mark, rest = scope["raw_path"].partition(b"://")
    if not mark or scheme.lower() not in (b"http", b"https"):
        return scope
    host, slash, path = rest.partition(b"/")
    raw = (slash + path) or b"/"
    headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
    headers.append((b"host", host))
    return {**scope, "raw_path": raw, "path": unquote(raw.decode("ascii")), "headers": headers}
