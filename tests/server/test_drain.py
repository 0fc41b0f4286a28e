"""The end of a server in a process of its own: signals, exit codes, what was running."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import openai
import pytest

from tiny_llm.server.settings import ServerSettings

if TYPE_CHECKING:
    from tests.server.conftest import Process

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LONG = {"prompt": "Tell me a story.", "max_tokens": 700, "ignore_eos": True, "seed": 1}


@pytest.fixture
def process(request: pytest.FixtureRequest, start_process: Any) -> Iterator[Process]:
    one = start_process(*getattr(request, "param", ()))
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


@pytest.mark.parametrize("process", [("--drain-seconds", "0.5", "--max-concurrent", "4")], indirect=True)
def test_a_drain_that_expires_tells_everyone(process: Process) -> None:
    """It cut their streams, and wrote a traceback for each: 265 KB for 60."""
    chat = {"messages": [{"role": "user", "content": "A story."}], "max_tokens": 900, "ignore_eos": True}
    asked = [
        ("/v1/completions", {**LONG, "n": 8}),
        ("/v1/chat/completions", {**chat, "n": 8}),
        ("/v1/responses", {"input": "A story.", "max_output_tokens": 900}),
        ("/generate", {**LONG, "n": 8}),
    ]
    streamed = [process.ask({**body, "stream": True}, path) for _ in range(4) for path, body in asked]
    whole = [process.ask(body, path) for path, body in asked]
    half_sent = process.connect()
    half_sent.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
    assert streamed[0].recv(12) == b"HTTP/1.1 200"
    with process.http() as http:
        assert http.get("/health").status_code == 200, "those who came before are let in"
    process.tell(signal.SIGTERM)
    for number, client in enumerate(streamed):
        said = b"".join(iter(lambda one=client: one.recv(1 << 16), b"")).decode()
        if " 503 " in said.partition("\r\n")[0]:  # it had not begun
            assert "draining" in said
            continue
        path = asked[number % len(asked)][0]
        assert "time to drain is over" in said and "data: [DONE]" in said, f"{path}: {said[-300:]}"
    for client in whole:
        said = b"".join(iter(lambda one=client: one.recv(1 << 16), b"")).decode()
        assert " 503 " in said.partition("\r\n")[0] and '"draining"' in said, said[:300]
    assert process.wait() == 0
    assert process.rest_of_stderr() == ""


@pytest.mark.parametrize("process", [("--drain-seconds", "600")], indirect=True)
def test_who_wants_nothing_more_is_not_waited_for(process: Process) -> None:
    chat: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "A story."}]}
    url = f"{process.url}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="none") as idle,
        openai.OpenAI(base_url=url, api_key="-") as left,
    ):
        assert idle.chat.completions.create(**chat, max_tokens=2).choices
        asked = left.chat.completions.create(**chat, extra_body={"ignore_eos": True}, stream=True)
        next(iter(asked))
        asked.close()
        with process.connect() as half_sent, process.connect():
            half_sent.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
            with process.http() as http:
                assert http.get("/health").status_code == 200, "those who came before are let in"
                process.tell(signal.SIGTERM)
                assert process.wait() == 0


def test_who_reads_nothing_is_not_waited_for(start: Any, until: Any) -> None:
    """A drain lasted to its end for a client that kept a stream open and had left off reading it."""
    with socket.socket() as reader, start(ServerSettings(drain_s=600)) as running:
        connections = running.server.server_state.connections
        reader.connect(("127.0.0.1", int(running.url.rsplit(":", 1)[1])))
        reader.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000)
        until(lambda: any(one.flow.write_paused for one in connections), "all buffers to be full")


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "kept alive"])
def test_with_few_files_others_wait_and_it_is_said_once(start_process: Any, silent: bool) -> None:
    """150 connections at ulimit -n 64 made 12 MB of tracebacks in 10 s."""
    process = start_process(files=64)
    clients: list[socket.socket] = []
    try:
        clients += [process.connect() for _ in range(150)]
        for client in () if silent else clients:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with process.http() as http:
            assert http.get("/health").status_code == 200, "those who ask for nothing make room"
        for client in () if silent else clients:
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 "), "each was answered"
        process.tell(signal.SIGTERM)
        assert process.wait() == 0
        said = process.rest_of_stderr()
        assert said.count("\n") == 1 and "ulimit -n" in said, said[:2000]
    finally:
        for client in clients:
            client.close()
        process.end()


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
