"""Owns what is refused before any of our routes runs: the ASGI guard around the whole application.

Headers, host, key, state, number of requests, and the body's size and pace, in this order. The body is read
here, whole, so that a route never waits for a client's bytes; after it a route can wait for the client
to go away. Knows nothing of what a body means.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Sequence

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiny_llm.server.page_files import PAGE_FILES
from tiny_llm.server.problems import Problem
from tiny_llm.server.settings import ServerSettings

Headers = Sequence[tuple[bytes, bytes]]
OPEN_PATHS = frozenset({"/health", *PAGE_FILES})
"""No key, no model: whether we live, and the page, which asks its user for the key."""


class Guard:
    """Wraps ``app``. ``problem`` says why nothing can be served now, if so.

    ``local_only``: we listen on a loopback address. Then, without a key, only who calls us by such an
    address or by "localhost" is answered: any web page may give its own name our address (DNS rebinding),
    and its visitor's browser would take us for a part of that site.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        problem: Callable[[], Problem | None],
        *,
        local_only: bool = False,
    ) -> None:
        self.in_flight = 0
        self._local_only = local_only and not settings.api_keys
        self._app = app
        self._settings = settings
        self._problem = problem
        self._digests = [_digest(key.encode()) for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse to."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        takes_place = False
        try:
            scope.setdefault("state", {})["salt"] = self._check(scope)
            takes_place = scope["method"] == "POST"  # who only looks takes nobody's place
            self.in_flight += takes_place
            body = await self._read(scope, receive)
        except Problem as problem:
            await problem.response(scope["path"])(scope, receive, send)
        else:
            if body is not None:  # else the client is gone
                scope["state"]["body_bytes"] = len(body)
                message: Message = {"type": "http.request", "body": body, "more_body": False}
                await self._app(scope, replayed(message, receive), send)
        finally:
            self.in_flight -= takes_place

    def _check(self, scope: Scope) -> str:
        """The key's own salt for the prefix cache. Raises Problem for what is refused by its head alone."""
        settings, headers = self._settings, scope["headers"]
        if "problem" in scope["state"]:  # it could not even be parsed
            raise scope["state"]["problem"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > settings.max_headers or size > settings.max_header_bytes:
            most = f"{settings.max_headers} headers of {settings.max_header_bytes} bytes"
            raise Problem(431, f"The request has {len(headers)} headers of {size} bytes; at most {most}.")
        names = {name for name, _ in headers}
        if b"content-length" in names and b"transfer-encoding" in names:  # two ways to tell where it ends
            what = "Content-Length and Transfer-Encoding were both given; a body has one length: send one."
            raise Problem(400, what, code="invalid_framing", headers={"Connection": "close"})
        if self._local_only:
            _require_local(headers)
        if scope["path"] in OPEN_PATHS:
            return ""
        salt = self._salt(headers, scope["method"])
        problem = self._problem()
        if problem is not None:
            raise problem
        if self.in_flight >= settings.max_in_flight and scope["method"] == "POST":
            raise Problem(429, f"{self.in_flight} requests are served, which is the most.", code="queue_full")
        return salt

    def _salt(self, headers: Headers, method: str) -> str:
        if not self._digests or method == "OPTIONS":  # a browser asks before it sends a key
            return ""
        given = _keys(headers)
        digest = _digest(given[0] if given else b"")
        matches = [hmac.compare_digest(digest, own) for own in self._digests]  # all: no early way out
        if len(set(given)) != 1 or not any(matches):
            state = "Incorrect API key provided" if given else "An API key is needed"
            what = f"{state}; send it as: Authorization: Bearer KEY (or X-Api-Key: KEY)"
            raise Problem(401, what, code="invalid_api_key")
        return digest.hex()

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away. Raises Problem once it is too large, or too late."""
        most, seconds = self._settings.max_body_bytes, self._settings.read_timeout_s
        what = f"The body has more than {most} bytes, which is the most."
        too_large = Problem(413, what, code="body_too_large")
        said = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if int(said) > most:  # the HTTP parser let only digits through
            raise too_large
        pieces, size = [], 0
        try:
            async with asyncio.timeout(seconds):
                async for piece in Request(scope, receive).stream():
                    pieces.append(piece)
                    size += len(piece)
                    if size > most:
                        raise too_large
        except ClientDisconnect:
            return None
        except TimeoutError:
            what = f"The body did not arrive within {seconds:g} s."
            raise Problem(408, what, code="timeout") from None
        return b"".join(pieces)


def _keys(headers: Headers) -> list[bytes]:
    """All keys that were given; b"" for a header that is none."""
    found = []
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            found.append(key.strip() if scheme.lower() == b"bearer" else b"")
        elif name == b"x-api-key":
            found.append(value.strip())
    return found


def _require_local(headers: Headers) -> None:
    """Raises Problem for a Host that is no name of this machine's own."""
    hosts = [value.decode("latin-1").lower() for name, value in headers if name == b"host"]
    for host in hosts:  # HTTP/1.1 has one; HTTP/1.0 may have none, and no browser speaks it
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name != "localhost" and not is_loopback(name):
            what = (
                f"The Host is {host[:80]!r}, but a server on a loopback address without a key is called by "
                "localhost or its address. Set an --api-key, or let the proxy send Host: localhost."
            )
            raise Problem(403, what, code="wrong_host")


def is_loopback(host: str) -> bool:
    """Whether ``host`` is an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def replayed(message: Message, receive: Receive) -> Receive:
    """``message`` once more, then what comes after it."""
    messages = [message]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
