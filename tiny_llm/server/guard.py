"""Owns what is refused before any of our routes runs: the ASGI guard around the whole application.

Key, state, number of requests, headers, and the body's size and pace, in this order. The body is read
here, whole, so that a route never waits for a client's bytes; after it a route can wait for the client
to go away. Knows nothing of what a body means.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiny_llm.server.page_files import PAGE_FILES
from tiny_llm.server.problems import Problem
from tiny_llm.server.settings import ServerSettings

OPEN_PATHS = frozenset({"/health", *PAGE_FILES})
"""No key, no model: whether we live, and the page, which asks its user for the key."""


class Guard:
    """Wraps ``app``. ``problem`` says why nothing can be served now, if so."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, problem: Callable[[], Problem | None]) -> None:
        self.in_flight = 0
        self._app = app
        self._settings = settings
        self._problem = problem
        self._digests = [_digest(key.encode()) for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse to."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            scope.setdefault("state", {})["salt"] = self._check(scope)
        except Problem as problem:
            return await problem.response()(scope, receive, send)
        if scope["method"] != "POST":  # who only looks takes nobody's place
            return await self._serve(scope, receive, send)
        self.in_flight += 1
        try:
            await self._serve(scope, receive, send)
        finally:
            self.in_flight -= 1

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._settings.read_timeout_s):
                body = await self._read(scope, receive)
        except TimeoutError:
            seconds = self._settings.read_timeout_s
            late = Problem(408, f"The body did not arrive within {seconds:g} s.", code="timeout")
            return await late.response()(scope, receive, send)
        except Problem as problem:
            return await problem.response()(scope, receive, send)
        if body is None:  # the client is gone
            return
        scope["state"]["body_bytes"] = len(body)
        await self._app(scope, _replayed(body, receive), send)

    def _check(self, scope: Scope) -> str:
        """The key's own salt for the prefix cache. Raises Problem for what is refused by its head alone."""
        settings, headers = self._settings, scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > settings.max_headers or size > settings.max_header_bytes:
            most = f"{settings.max_headers} headers of {settings.max_header_bytes} bytes"
            raise Problem(431, f"The request has {len(headers)} headers of {size} bytes; at most {most}.")
        if scope["path"] in OPEN_PATHS:
            return ""
        salt = self._salt([value for name, value in headers if name == b"authorization"], scope["method"])
        problem = self._problem()
        if problem is not None:
            raise problem
        if self.in_flight >= settings.max_in_flight and scope["method"] == "POST":
            raise Problem(429, f"{self.in_flight} requests are served, which is the most.", code="queue_full")
        return salt

    def _salt(self, given: list[bytes], method: str) -> str:
        if not self._digests or method == "OPTIONS":  # a browser asks before it sends a key
            return ""
        only = given[0] if len(given) == 1 else b""
        scheme, _, key = only.partition(b" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, own) for own in self._digests]  # all: no early way out
        if scheme.lower() != b"bearer" or not any(matches):
            state = "is not a key of this server" if given else "is needed"
            what = f"An API key {state}; send it as: Authorization: Bearer KEY"
            raise Problem(401, what, code="invalid_api_key")
        return digest.hex()

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away. Raises Problem as soon as it is too large."""
        most = self._settings.max_body_bytes
        said = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if int(said) > most:  # the HTTP parser let only digits through
            raise _too_large(most)
        pieces, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > most:
                raise _too_large(most)
            if not message.get("more_body", False):
                return b"".join(pieces)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _too_large(most: int) -> Problem:
    return Problem(413, f"The body has more than {most} bytes, which is the most.", code="body_too_large")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what comes after it: the client's going away."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
