"""A really running server on the bundled model, shared by the tests of a folder; clients of it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import mlx.core as mx
import openai
import pytest

from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.server.run import Server, listen
from tiny_llm.server.service import Service
from tiny_llm.server.settings import ServerSettings

PATIENCE_S = 20.0
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Running:
    """A server in a thread of this process, and where it is."""

    server: Server
    url: str

    @property
    def service(self) -> Service:
        return self.server.service

    @property
    def engine(self) -> AsyncLLM:
        return self.service.engine

    def http(self, **options: object) -> httpx.Client:
        """A client; without certificates, whose reading takes 50 ms and which plain http does not look at."""
        return httpx.Client(base_url=self.url, timeout=60, verify=False, **options)  # type: ignore[arg-type]

    def openai(self, key: str = "none", *, strict: bool = True) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=key,
            max_retries=0,
            timeout=60,
            http_client=openai.DefaultHttpxClient(verify=False),
            _strict_response_validation=strict,
        )

    def slow_down(self, seconds: float) -> None:
        """Let each step take that long, so that an answer is still under way when a test looks."""
        engine = self.engine.llm.engine
        model = engine.runner.model

        def slow(*args: Any) -> mx.array:
            time.sleep(seconds)
            return model(*args)

        slow.config = model.config  # type: ignore[attr-defined]
        engine.runner.model = slow  # type: ignore[assignment]

    def used_blocks(self) -> int:
        """By requests: contexts hold theirs until they are removed."""
        usage = self.engine.llm.engine.scheduler.usage()
        return usage.used - usage.pinned

    def wait_until_idle(self) -> None:
        """Until no request is left, and no block is in use."""
        wait_for(lambda: not len(self.engine.llm.engine) and self.used_blocks() == 0, "the engine to be idle")
        self.engine.llm.engine.scheduler.check_integrity()


class Process:
    """``main.py serve`` as a user starts it."""

    def __init__(self, *options: str, files: int | None = None) -> None:
        command = [sys.executable, str(ROOT / "main.py"), "serve", "--port", "0", *options]
        if files is not None:
            command = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *command]
        self._child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert self._child.stderr is not None
        self.memory, self.said = self._child.stderr.readline(), self._child.stderr.readline()
        self.url = self.said.split(" at ")[-1].split(" ")[0].strip()

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, verify=False)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", int(self.url.rsplit(":", 1)[1])), timeout=60)

    def ask(self, body: dict[str, object], path: str = "/v1/completions") -> socket.socket:
        """Send a request on a connection of its own, and do not wait."""
        return self.send(path, json.dumps(body).encode())

    def send(self, path: str, data: bytes) -> socket.socket:
        """``ask`` with a body as it is."""
        one = self.connect()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        one.sendall(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        return one

    def tell(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def computed_s(self) -> float:
        """Seconds that its threads have computed, all together; where that is not told, the time."""
        if sys.platform != "linux":
            return time.perf_counter()
        return time.clock_gettime(~self._child.pid << 3 | 2)  # the clock of another process

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self._child.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])

    def wait(self) -> int:
        return self._child.wait(30)

    def rest_of_stderr(self) -> str:
        """What it said after its first two lines. Call it at the end."""
        assert self._child.stderr is not None
        return self._child.stderr.read()

    def end(self) -> None:
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()


def wait_for(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < end, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(
    demo: Path,
    settings: ServerSettings | None = None,
    *,
    scheduler: SchedulerSettings | None = None,
    load: Callable[[], AsyncLLM] | None = None,
) -> Iterator[Running]:
    """Serve the bundled model until the block ends."""

    def made() -> AsyncLLM:
        own = EngineSettings(kv_blocks=512, scheduler=scheduler or SchedulerSettings())
        return AsyncLLM(demo, engine=own)

    service = Service(settings or ServerSettings(), load or made)
    listening = listen("127.0.0.1", 0)
    server = Server(service, listening)

    async def run() -> None:
        serving = asyncio.ensure_future(server.serve([listening]))
        await service.start()
        await serving
        await service.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started and (load is not None or service.state == "ready"), "the server")
        yield Running(server, f"http://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        service.draining = server.should_exit = True
        thread.join(PATIENCE_S)
        listening.close()
        assert not thread.is_alive(), "the server did not end"


@pytest.fixture(scope="session")
def running(demo: Path) -> Iterator[Running]:
    with serving(demo) as one:
        yield one
        one.wait_until_idle()


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with running.openai() as one:
        yield one


@pytest.fixture
def http(running: Running) -> Iterator[httpx.Client]:
    with running.http() as one:
        yield one


@pytest.fixture(scope="session")
def start(demo: Path) -> Callable[..., contextlib.AbstractContextManager[Running]]:
    """``with start(settings, scheduler=...) as running``: a server of a test's own."""
    return functools.partial(serving, demo)


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], bool], str], None]:
    """``until(done, what)``: wait for it, not for ever."""
    return wait_for


@pytest.fixture(scope="session")
def start_process() -> type[Process]:
    """``start_process(option, ...)``: a server in a process of its own; ``end()`` it."""
    return Process
