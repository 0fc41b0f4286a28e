"""What is refused before any work: keys, sizes, paces, full queues, a server that is not ready."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.errors import ConfigError
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.server.run import listen
from tiny_llm.server.settings import ServerSettings

if TYPE_CHECKING:
    from tests.server.conftest import Running

KEYS = ("first-secret", "second-secret")
ASK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
LONG = {"prompt": "A story.", "max_tokens": 900, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def guarded(start: Any) -> Iterator[Running]:
    limits = ServerSettings(
        api_keys=KEYS,
        max_body_bytes=10_000,
        max_headers=20,
        max_header_bytes=4_000,
        read_timeout_s=0.5,
        cors_origins=("http://friend.example",),
    )
    with start(limits) as one:
        yield one


def test_every_route_needs_a_key_but_health(guarded: Running) -> None:
    with guarded.http() as http:
        assert http.get("/health").status_code == 200
        paths = http.get("/openapi.json", headers={"Authorization": f"Bearer {KEYS[0]}"}).json()["paths"]
        for path, methods in paths.items():
            if path not in ("/health", "/"):
                for method in methods:
                    answer = http.request(method, path, json={})
                    assert answer.status_code == 401, f"{method} {path}"
                    error = answer.json()["error"]
                    assert error.get("code") == "invalid_api_key" or error["type"] == "authentication_error"
        for path in ("/docs", "/openapi.json", "/nowhere"):
            assert http.get(path).status_code == 401, path


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer wrong", "Basic first-secret", "first-secret", "Bearer first-secre"],
)
def test_a_wrong_key_is_a_401(guarded: Running, header: str) -> None:
    with guarded.http(headers={"Authorization": header}) as http:
        answer = http.get("/v1/models")
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert all(key not in answer.text for key in KEYS)


def test_the_client_raises_its_own_error_for_a_key(guarded: Running) -> None:
    with guarded.openai("wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.message.count("Incorrect API key provided"), (
        "litellm knows a wrong key by these words"
    )
    for key in KEYS:
        with guarded.openai(key) as client:
            assert client.chat.completions.create(model="demo", **ASK).choices


def test_keys_do_not_share_the_prefix_cache(guarded: Running) -> None:
    """CVE-2025-46570: how fast an answer begins must not tell what others asked."""
    long = {"messages": [{"role": "user", "content": "A secret that is long enough for a few blocks. " * 3}]}
    cached = []
    for key in (KEYS[0], KEYS[0], KEYS[1]):
        with guarded.openai(key) as client:
            used = client.chat.completions.create(model="demo", max_tokens=2, **long).usage
            assert used is not None and used.prompt_tokens_details is not None
            cached.append(used.prompt_tokens_details.cached_tokens)
    assert cached[0] < 16 <= cached[1] and cached[2] < 16, "a template's first words are no secret"


def test_a_body_that_is_too_large_is_a_413_before_it_is_read(guarded: Running) -> None:
    with guarded.http(headers={"Authorization": f"Bearer {KEYS[0]}"}) as http:
        answer = http.post("/v1/completions", json={"prompt": "x" * 20_000})
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
        assert http.get("/v1/models").status_code == 200
        head = request("POST", "/v1/completions", ("Content-Length", "99999999999"))
        assert b" 413 " in exchange(guarded, head), "said before a byte of it came"
        pieces = http.post("/v1/completions", content=(b"x" * 1000 for _ in range(20)))
        assert pieces.status_code == 413, "chunks have no length to be told by"


def test_headers_have_limits(guarded: Running) -> None:
    with guarded.http(headers={"Authorization": f"Bearer {KEYS[0]}"}) as http:
        for headers in ({f"X-{i}": "1" for i in range(30)}, {"X-Long": "x" * 4_500}):
            answer = http.get("/v1/models", headers=headers)
            assert answer.status_code == 431 and answer.json()["error"]["message"]
    said = exchange(guarded, b"GET / HTTP/1.1\r\nX-Huge: " + b"x" * 300_000 + b"\r\n\r\n")
    assert b" 431 " in said and said.endswith(b"}"), "an answer, and all of it"
    assert b" 400 " in exchange(guarded, b"GET / HTTP/1.1\r\n\r\n"), "no Host"
    assert b" 400 " in exchange(guarded, b"\x16\x03\x01\x00\xff nonsense\r\n\r\n")


def request(method: str, path: str, *headers: tuple[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEYS[0]}"]
    lines += [f"{name}: {value}" for name, value in (("Content-Type", "application/json"), *headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def exchange(running: Running, *pieces: bytes) -> bytes:
    """Send raw bytes and return what comes before the server closes or is silent for a while."""
    port = int(running.url.rsplit(":", 1)[1])
    said = b""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
            while piece := connection.recv(65_536):  # the head and the body may come apart
                said += piece
                connection.settimeout(0.5)
            return said
        except (ConnectionError, TimeoutError):
            return said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Half", b""),
        (b"", b""),
        (request("POST", "/v1/completions", ("Content-Length", "100")) + b'{"prompt', b" 408 "),
    ],
    ids=["half a header", "nothing", "half a body"],
)
def test_what_trickles_in_has_a_deadline(guarded: Running, sent: bytes, expected: bytes) -> None:
    began = time.monotonic()
    got = exchange(guarded, sent)
    assert expected in got and (expected or not got)
    assert time.monotonic() - began < 5, "the socket's own time-out, not the server's"


def test_cors_is_for_friends_only(guarded: Running, running: Running) -> None:
    asked = {"Origin": "http://friend.example", "Access-Control-Request-Method": "POST"}
    with guarded.http() as http:
        assert (
            http.options("/v1/models", headers=asked).headers["access-control-allow-origin"]
            == asked["Origin"]
        )
        other = http.options("/v1/models", headers={**asked, "Origin": "http://other.example"})
        assert "access-control-allow-origin" not in other.headers
    with running.http() as http:
        assert "access-control-allow-origin" not in http.get("/v1/models", headers=asked).headers


def test_a_full_queue_is_a_429(start: Any, until: Callable[..., None]) -> None:
    scheduler = SchedulerSettings(max_num_seqs=1, max_queued_requests=1)
    with start(scheduler=scheduler) as one, one.http() as http, one.openai() as client:
        one.slow_down(0.005)
        with http.stream("POST", "/v1/completions", json=LONG) as running:
            lines = running.iter_lines()
            next(lines)
            statuses: list[int] = []
            waiting = threading.Thread(
                target=lambda: statuses.append(http.post("/v1/completions", json={"prompt": "b"}).status_code)
            )
            waiting.start()
            until(lambda: one.engine.llm.engine.scheduler.num_waiting == 1, "one to wait")
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(model="demo", **ASK)
            assert caught.value.code == "queue_full" and caught.value.response.headers["retry-after"] == "1"
            streamed = http.post("/v1/completions", json={"prompt": "b", "stream": True})
            assert streamed.status_code == 429, "a stream is refused by its status too"
        waiting.join()
        assert statuses == [200], "it waited, and was answered when the first had gone"
        one.wait_until_idle()


def test_a_long_wait_is_a_503(start: Any) -> None:
    with start(scheduler=SchedulerSettings(max_num_seqs=1, max_wait_s=0.2)) as one, one.http() as http:
        one.slow_down(0.005)
        with http.stream("POST", "/v1/completions", json=LONG) as running:
            lines = running.iter_lines()
            next(lines)
            assert http.post("/v1/completions", json={"prompt": "b"}).status_code == 503
        one.wait_until_idle()


def test_more_prompts_than_can_ever_be_held_are_a_400(start: Any) -> None:
    """They were a 429 with Retry-After, for ever. As many as there are places for are answered."""
    with start(scheduler=SchedulerSettings(max_num_seqs=2, max_queued_requests=1)) as one, one.http() as http:
        few = http.post("/v1/completions", json={"prompt": ["a", "b", "c"], "max_tokens": 2})
        assert few.status_code == 200 and len(few.json()["choices"]) == 3, few.text
        many = http.post("/v1/completions", json={"prompt": ["a", "b", "c", "d"], "max_tokens": 2})
        assert many.status_code == 400 and many.json()["error"]["param"] == "prompt", many.text


def test_what_never_fits_the_memory_names_the_field_that_it_came_in(start: Any, demo: Any) -> None:
    """A 400: to send it again is no use, a shorter one is. What the model could take does not matter here."""
    with start(load=lambda: AsyncLLM(demo, engine=EngineSettings(kv_blocks=2))) as one, one.http() as http:
        while http.get("/health").status_code != 200:
            pass
        said = "a word " * 30
        for path, field, prompt in (
            ("/v1/completions", "prompt", said),
            ("/generate", "prompt", said),
            ("/v1/chat/completions", "messages", [{"role": "user", "content": said}]),
            ("/v1/responses", "input", said),
        ):
            for stream in (False, True):
                answer = http.post(path, json={field: prompt, "stream": stream})
                error = answer.json()["error"]
                assert error["param"] == field and error["code"] == "context_length_exceeded", (path, error)
                assert answer.status_code == 400 and "Retry-After" not in answer.headers
                assert error["type"] == "invalid_request_error" and "--kv-memory" in error["message"]


def test_as_many_as_may_run_and_wait_are_answered_though_they_come_at_once(start: Any) -> None:
    """Of 500 at the same moment 244 were refused where 256 may run and 256 wait."""
    few = SchedulerSettings(max_num_seqs=4, max_queued_requests=4)
    statuses: list[int] = []
    with start(ServerSettings(max_in_flight=8), scheduler=few) as one, one.http() as http:
        one.slow_down(0.002)

        def ask() -> None:
            asked = {"prompt": "b", "max_tokens": 8}
            statuses.append(http.post("/v1/completions", json=asked).status_code)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        one.wait_until_idle()
    assert statuses == [200] * 8


def test_too_many_in_flight_are_refused_before_their_bodies(start: Any) -> None:
    with start(ServerSettings(max_in_flight=1)) as one, one.http() as http:
        one.slow_down(0.005)
        with http.stream("POST", "/v1/completions", json=LONG) as running:
            lines = running.iter_lines()  # kept: without it the response closes
            next(lines)
            assert http.post("/v1/completions", json={"prompt": "b"}).status_code == 429
            assert http.get("/health").status_code == 200 and http.get("/metrics").status_code == 200
        one.wait_until_idle()
        assert http.post("/v1/completions", json={"prompt": "b"}).status_code == 200


def test_loading_is_said_and_health_answers(start: Any, demo: Any) -> None:
    may_load = threading.Event()

    def load() -> AsyncLLM:
        may_load.wait(20)
        return AsyncLLM(demo, engine=EngineSettings(kv_blocks=64))

    with start(load=load) as one, one.http() as http:
        health = http.get("/health")
        assert health.status_code == 503 and health.json() == {
            "status": "loading",
            "live": True,
            "ready": False,
        }
        refused = http.post("/v1/chat/completions", json=ASK)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
        assert refused.headers["retry-after"]
        may_load.set()
        while http.get("/health").status_code != 200:
            time.sleep(0.01)
        assert http.post("/v1/chat/completions", json=ASK).status_code == 200


def test_what_cannot_be_served_is_said_before_loading(start: Any) -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="cannot be listened on"):
        listen("127.0.0.1", taken.getsockname()[1])
    for host, port in (("no.such.host.invalid", 0), ("127.0.0.1", 99_999)):
        with pytest.raises(ConfigError, match="cannot be listened on"):
            listen(host, port)


@pytest.mark.parametrize(
    "wrong",
    [
        {"api_keys": ("",)},
        {"api_keys": ("clé",)},
        {"max_in_flight": 0},
        {"read_timeout_s": 0},
        {"drain_s": -1},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerSettings(**wrong)
