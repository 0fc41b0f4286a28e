"""Clients that go away, engines that break: no block stays in use, and others are served on."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest

from tiny_llm.engine.engine import Engine

if TYPE_CHECKING:
    import httpx2 as httpx

    from tests.server.conftest import Running

LONG = {"prompt": "Tell me a story.", "max_tokens": 900, "ignore_eos": True, "seed": 1}
SHORT = {"prompt": "What is a KV cache?", "max_tokens": 8, "temperature": 0}


def engine_of(running: Running) -> Engine:
    return running.engine.llm.engine


def test_a_stream_that_is_left_stops_within_two_steps(running: Running, until: Callable[..., None]) -> None:
    with (
        running.http() as http,
        http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer,
    ):
        lines = answer.iter_lines()  # kept: without it the response closes
        next(lines)
        assert len(engine_of(running)) == 1 and running.used_blocks() > 0
    running.wait_until_idle()
    ends = engine_of(running).totals.ends
    assert ends["cancelled"] >= 1


def test_whoever_hangs_up_while_waiting_for_the_whole_stops_it_too(
    running: Running, until: Callable[..., None]
) -> None:
    for path, body in (
        ("/v1/completions", {**LONG, "n": 3}),
        ("/v1/completions", {**LONG, "prompt": ["a story", "a song"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}),
        ("/generate", LONG),
    ):
        leaving = Leaving(running, path, body)
        until(lambda: len(engine_of(running)) > 0, f"{path} to begin")
        leaving.hang_up()
        running.wait_until_idle()


class Leaving:
    """A client on a bare socket, which can go at any moment."""

    def __init__(self, running: Running, path: str, body: dict[str, Any], receive_bytes: int = 0) -> None:
        data = json.dumps(body).encode()
        self._socket = socket.socket()
        self._socket.settimeout(20)
        if receive_bytes:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._socket.connect(("127.0.0.1", int(running.url.rsplit(":", 1)[1])))
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += "Connection: close\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    def read(self, size: int) -> None:
        self._socket.recv(size)

    def read_all(self) -> bytes:
        """Until the server hangs up."""
        return b"".join(iter(lambda: self._socket.recv(1 << 16), b""))

    def hang_up(self) -> None:
        self._socket.close()


@pytest.mark.slow
def test_200_clients_that_die_leave_no_block_in_use(running: Running) -> None:
    """Streaming and not, before the first token and after some, one prompt and several."""
    rng = random.Random(6)

    def die(number: int) -> None:
        body = {**LONG, "prompt": f"Story {number}", "stream": number % 2 == 0, "n": 1 + number % 3}
        leaving = Leaving(running, "/v1/completions", body)
        if number % 2 == 0 and number % 5:
            leaving.read(rng.randrange(1, 5000))
        leaving.hang_up()

    threads = [threading.Thread(target=die, args=(number,)) for number in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    running.wait_until_idle()
    assert engine_of(running).healthy and not running.engine.restarts
    with running.http() as http:
        assert http.post("/v1/completions", json=SHORT).status_code == 200
        text = http.get("/metrics").text
    assert "tiny_llm_kv_cache_used_blocks{" in text
    used = next(line for line in text.splitlines() if line.startswith("tiny_llm_kv_cache_used_blocks"))
    assert used.endswith(" 0.0")


@pytest.mark.slow
def test_a_slow_reader_slows_nobody_and_misses_nothing(running: Running) -> None:
    """It reads nothing until all is made: the engine, its memory and other clients do not wait for it."""
    body = {**LONG, "stream": True, "n": 8, "speculate": False, "stream_options": {"include_usage": True}}
    slow = Leaving(running, "/v1/completions", body, receive_bytes=4096)
    with running.http() as http:
        first = http.post("/v1/completions", json=SHORT).json()["choices"]
        assert first == http.post("/v1/completions", json=SHORT).json()["choices"]
        running.wait_until_idle()
        said = slow.read_all()
    assert len(said) > 500_000, "or system buffers took it all, and it was not slow"
    events = [line for line in said.split(b"\n") if line.startswith(b"data: ")]
    assert events[-1] == b"data: [DONE]"
    assert json.loads(events[-2][6:])["usage"]["completion_tokens"] == 8 * LONG["max_tokens"]
    assert said.count(b'"finish_reason":"length"') == 8


def test_a_failure_in_mid_stream_is_an_event_then_done(start: Any) -> None:
    with start() as one, one.http() as http:
        break_after(engine_of(one), 5)
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            assert answer.status_code == 200
            lines = [line for line in answer.iter_lines() if line]
        assert '"error":' in lines[-2] and "MemoryError" in lines[-2] and lines[-1] == "data: [DONE]"
        assert http.post("/v1/completions", json=SHORT).status_code == 200, "the engine goes on"
        break_after(engine_of(one), 2)
        whole = http.post("/v1/completions", json=LONG)
        assert whole.status_code == 500 and whole.json()["error"]["code"] == "generation_failed"
        one.wait_until_idle()


def break_after(engine: Engine, calls: int) -> None:
    """The model fails once, in its ``calls``-th call from now."""
    model, made = engine.runner.model, [0]

    def spoilt(*args: Any) -> mx.array:
        made[0] += 1
        if made[0] == calls:
            raise MemoryError("by design")
        return model(*args)

    spoilt.config = model.config  # type: ignore[attr-defined]
    engine.runner.model = spoilt  # type: ignore[assignment]


def test_an_engine_that_breaks_is_made_anew_once_and_then_said_to_be_dead(
    start: Any, until: Callable[..., None]
) -> None:
    with start() as one, one.http() as http:
        before = http.post("/v1/completions", json=SHORT).json()["choices"]
        break_the_loop(one)
        broken = http.post("/v1/completions", json=LONG)
        assert broken.status_code == 503 and "made anew" in broken.json()["error"]["message"]
        assert http.get("/health").status_code == 200 and one.engine.restarts == 1
        assert http.post("/v1/completions", json=SHORT).json()["choices"] == before
        one.wait_until_idle()
        break_the_loop(one)
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            assert answer.status_code == 503
        until(lambda: not one.engine.alive, "the thread's end")
        assert http.get("/health").json() == {"status": "dead", "live": False, "ready": False}
        refused = http.post("/v1/completions", json=SHORT)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "dead"


def break_the_loop(running: Running) -> None:
    """The scheduler itself fails, which no request can cause."""

    def fail() -> None:
        raise RuntimeError("by design")

    engine_of(running).scheduler.schedule = fail  # type: ignore[assignment,method-assign]


@pytest.mark.slow
def test_health_answers_while_a_template_is_busy(running: Running, http: httpx.Client) -> None:
    big = [{"role": "user", "content": "word " * 200_000}]
    done: list[int] = []
    busy = threading.Thread(
        target=lambda: done.append(http.post("/v1/chat/completions", json={"messages": big}).status_code)
    )
    busy.start()
    with running.http() as other:
        for _ in range(20):
            assert other.get("/health").status_code == 200
    busy.join()
    assert done == [400]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_ids_are_ours(http: httpx.Client, path: str) -> None:
    ask = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
    ids = {http.post(path, json=ask, headers={"X-Request-Id": "mine"}).json()["id"] for _ in range(3)}
    assert len(ids) == 3 and not any("mine" in one for one in ids)
