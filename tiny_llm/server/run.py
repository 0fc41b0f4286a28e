"""Owns a server's life: socket, loading, serving, signals, the end.

SIGTERM and SIGINT: accept no more, let what runs end within ``drain_s``, tell the others, exit with 0: at
once where nothing runs for anybody. The second one ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Generator, Sequence
from types import FrameType
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from tiny_llm.engine.budget import MemoryBudget
from tiny_llm.errors import ConfigError
from tiny_llm.server.app import create_app
from tiny_llm.server.connections import Acceptor, DeadlineProtocol, max_connections, raise_file_limit
from tiny_llm.server.envelope import Envelope
from tiny_llm.server.guard import Guard, is_loopback
from tiny_llm.server.models import Models
from tiny_llm.server.service import Service

BACKLOG = 2048
GRACE_S = 2.0  # after the drain: to tell who still waits, and then for what does not watch its client
SWITCH_S = 0.001
"""How long a thread that computes keeps Python from the event loop, which wants it several times a request.
It would be 5 ms."""
STALLED_S = 5.0  # how long a drain waits for a client that takes nothing of what lies ready for it


class Server(uvicorn.Server):
    """uvicorn with our application, and with our word on signals."""

    def __init__(
        self,
        service: Service,
        listening: socket.socket,
        others: Sequence[Service] = (),
        unload_after_s: float | None = None,
        budget: MemoryBudget | None = None,
    ) -> None:
        settings = service.settings
        self.service, self.services = service, (service, *others)
        for other in others:
            other.rests = True
        is_alone = not others and unload_after_s is None
        several = None if is_alone else Models(self.services, unload_after_s, budget)
        config = uvicorn.Config(
            application(service, several, local_only=is_loopback(listening.getsockname()[0])),
            http=DeadlineProtocol.within(settings.read_timeout_s),
            ws="none",
            lifespan="off",
            interface="asgi3",
            access_log=False,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=settings.max_header_bytes + 2**12,
            timeout_graceful_shutdown=math.ceil(settings.drain_s + 2 * GRACE_S),
        )
        super().__init__(config)
        self._accepting: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections; how many, is said in connections.py, not by asyncio's own server."""
        self.servers = []
        protocol: Any = self.config.http_protocol_class
        make = functools.partial(protocol, self.config, self.server_state, self.lifespan.state)
        open_ones: Any = self.server_state.connections
        acceptor = Acceptor(make, open_ones, max_connections())
        self._accepting = [asyncio.ensure_future(acceptor.run(one)) for one in sockets or ()]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more; wait for what runs; after ``drain_s`` tell its clients, then hang up."""
        for accepting in self._accepting:
            accepting.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        loop, drain_s = asyncio.get_running_loop(), self.service.settings.drain_s
        told = loop.call_later(drain_s, self._stop)
        hung_up = loop.call_later(drain_s + GRACE_S, self._hang_up)
        watched = asyncio.ensure_future(self._leave_stalled())
        await super().shutdown(sockets)
        for waiting in (told, hung_up, watched):
            waiting.cancel()

    def _stop(self) -> None:
        for service in self.services:
            service.stop()

    async def close(self) -> None:
        """End all engines' threads."""
        for service in self.services:
            await service.close()

    async def _leave_stalled(self) -> None:
        """Hang up on who reads nothing: an answer that nobody takes would be waited for to the end."""
        connections: Any = self.server_state.connections
        loop = asyncio.get_running_loop()
        seen: dict[Any, tuple[int, float]] = {}  # bytes that lie ready, and since when
        while True:
            for connection in list(connections):
                unsent = connection.transport.get_write_buffer_size()
                if not unsent or unsent != seen.get(connection, (0, 0.0))[0]:
                    seen[connection] = (unsent, loop.time())
                elif loop.time() - seen[connection][1] >= STALLED_S:
                    connection.transport.abort()
            await asyncio.sleep(STALLED_S / 10)

    def _hang_up(self) -> None:
        """Each request sees that its client is gone, and ends as it does then."""
        connections: Any = self.server_state.connections
        for connection in list(connections):
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: drain at the first one, end at the second."""
        if self.should_exit:
            os._exit(128 + sig)
        self.leave()

    def leave(self) -> None:
        """There is nothing to be served any more: let go of who still waits, and end."""
        self.should_exit = True
        for service in self.services:
            service.draining = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """uvicorn's own would raise the signal once more at the end: then no exit code would be 0."""
        if threading.current_thread() is not threading.main_thread():  # Python allows it nowhere else
            yield
            return
        handlers = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for sig, handler in handlers.items():
                signal.signal(sig, handler)


def application(service: Service, several: Models | None = None, *, local_only: bool) -> ASGIApp:
    """Routes, of one model or ``several``, in the guard, in what refusals have too; ``local_only`` is its."""
    settings = service.settings
    routes = several or create_app(service)
    app: ASGIApp = Guard(routes, settings, (several or service).problem, local_only=local_only)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # a key is no cookie: a browser adds nothing that its page does not know
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return Envelope(app)


def serve(
    services: Sequence[Service],
    host: str,
    port: int,
    unload_after_s: float | None = None,
    budget: MemoryBudget | None = None,
) -> None:
    """Serve until a signal: the first of ``services`` is loaded at once, each other one when asked for.

    Several have shares of ``budget``.

    Raises ConfigError if the port cannot be had, and what loading raises.
    """
    raise_file_limit()
    sys.setswitchinterval(SWITCH_S)
    listening = listen(host, port)
    try:
        server = Server(services[0], listening, services[1:], unload_after_s, budget)
        asyncio.run(_serve(server, listening))
    finally:
        listening.close()


async def _serve(server: Server, listening: socket.socket) -> None:
    """Listen from the beginning, so that /health can say "loading"."""
    serving = asyncio.ensure_future(server.serve([listening]))
    loading = asyncio.ensure_future(server.service.start())
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            engine, loop = server.service.engine, asyncio.get_running_loop()
            engine.when_broken(lambda: loop.call_soon_threadsafe(server.leave))
            gc.collect()
            gc.freeze()  # what is there now stays: the collector took 80 ms each time to look at it
            host, port = listening.getsockname()[:2]
            names = ", ".join(service.settings.name for service in server.services)
            place = f"[{host}]" if ":" in host else host
            for line in filter(None, (server.service.llm.memory, server.service.llm.kernels.line)):
                print(line, file=sys.stderr)
            said = f"Serving {names} at http://{place}:{port} (a page to chat and to watch; Ctrl-C ends it)"
            print(said, file=sys.stderr, flush=True)
        await serving
    finally:
        server.should_exit = True
        await serving
        if loading.done() and loading.exception() is None:
            await server.close()
            if server.service.broken is not None:  # whoever restarts processes is to start this again
                raise server.service.broken


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError if it cannot be had."""
    if not 0 <= port < 2**16:  # the resolver would take it modulo 2**16
        raise ConfigError(f"{host} port {port} cannot be listened on: a port is from 0 to 65535.")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as stack:
            listening = stack.enter_context(socket.socket(family, kind, proto))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(BACKLOG)
            stack.pop_all()  # it stays open
            return listening
    except OSError as error:
        raise ConfigError(
            f"{host} port {port} cannot be listened on: {error}. Choose another --port."
        ) from error
