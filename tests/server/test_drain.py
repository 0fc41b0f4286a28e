"""The end of a server in a process of its own: signals, exit codes, what was running."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LONG = {"prompt": "Tell me a story.", "max_tokens": 700, "ignore_eos": True, "seed": 1}


class Process:
    """``main.py serve`` as a user starts it."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, str(ROOT / "main.py"), "serve", "--port", "0", *options]
        self._child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert self._child.stderr is not None
        self.memory, self.said = self._child.stderr.readline(), self._child.stderr.readline()
        self.url = self.said.split(" at ")[-1].split(" ")[0].strip()

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, verify=False)

    def ask(self, body: dict[str, object]) -> socket.socket:
        """Send a completion's request on a connection of its own, and do not wait."""
        data = json.dumps(body).encode()
        one = socket.create_connection(("127.0.0.1", int(self.url.rsplit(":", 1)[1])), timeout=60)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        one.sendall(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        return one

    def tell(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def wait(self) -> int:
        return self._child.wait(30)

    def end(self) -> None:
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[Process]:
    one = Process(*getattr(request, "param", ()))
    yield one
    one.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_completes_and_new_ones_are_refused(process: Process, number: signal.Signals) -> None:
    assert "keys and values" in process.memory
    assert process.said.startswith("Serving demo at http://127.0.0.1:")
    with process.http() as http:
        whole: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: whole.append(http.post("/v1/completions", json=LONG)))
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            asking.start()
            for _ in range(400):
                if 'num_requests_running{model_name="demo"} 2.0' in http.get("/metrics").text:
                    break
            process.tell(number)
            rest = [line for line in lines if line]
        asking.join()
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert whole[0].status_code == 200 and whole[0].json()["usage"]["completion_tokens"] == 700
    assert process.wait() == 0
    with pytest.raises(httpx.ConnectError), process.http() as http:
        http.get("/health")


@pytest.mark.parametrize("process", [("--max-concurrent", "4")], indirect=True)
def test_under_load_nothing_that_was_taken_is_lost(process: Process) -> None:
    """Streams and whole answers, those that run and those that still wait for their turn."""
    clients = [process.ask({**LONG, "prompt": f"Story {i}", "stream": i % 2 == 0}) for i in range(12)]
    with process.http() as http:
        for _ in range(1000):
            told = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line)
            running, waiting = (
                float(told[f'tiny_llm_num_requests_{state}{{model_name="demo"}}'])
                for state in ("running", "waiting")
            )
            if (running, waiting) == (4, 8):
                break
    assert (running, waiting) == (4, 8)
    process.tell(signal.SIGTERM)
    for client in clients:
        said = b"".join(iter(lambda one=client: one.recv(1 << 16), b"")).decode()
        assert said.startswith("HTTP/1.1 200 ") and '"finish_reason":"length"' in said, said
        client.close()
    assert process.wait() == 0


@pytest.mark.parametrize("process", [("--drain-seconds", "0")], indirect=True)
def test_without_time_to_drain_it_ends_soon(process: Process) -> None:
    asked = {**LONG, "n": 16, "stream": True}
    with process.http() as http, http.stream("POST", "/v1/completions", json=asked) as answer:
        lines = answer.iter_lines()  # kept: without it the response closes
        next(lines)
        began = time.monotonic()
        process.tell(signal.SIGTERM)
        assert process.wait() == 0
        assert time.monotonic() - began < 20


def test_a_second_signal_ends_it_at_once(process: Process) -> None:
    with (
        process.http() as http,
        http.stream("POST", "/v1/completions", json={**LONG, "n": 16, "stream": True}) as a,
    ):
        lines = a.iter_lines()  # kept: without it the response closes
        next(lines)
        process.tell(signal.SIGTERM)
        time.sleep(0.2)
        process.tell(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--model", "no-such-model-folder/x/y"], "no-such-model"),
        (["--port", "99999"], "99999"),
        (["--api-key", ""], "--api-key"),
        (["--max-concurrent", "0"], "max_num_seqs"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(options: list[str], what: str) -> None:
    command = [sys.executable, str(ROOT / "main.py"), "serve", "--offline", "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and what in done.stderr
