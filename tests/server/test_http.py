"""HTTP as load balancers, browsers and proxies expect it, on answers and refusals alike."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tiny_llm.server.page_files import PAGE_FILES
from tiny_llm.server.settings import ServerSettings

if TYPE_CHECKING:
    from tests.server.conftest import Running

FRIEND = "http://friend.example"
KEY = "secret"


@pytest.fixture(scope="module")
def keyed(start: Any) -> Iterator[Running]:
    settings = ServerSettings(
        api_keys=(KEY,), cors_origins=(FRIEND,), max_body_bytes=1000, max_headers=20, max_in_flight=1
    )
    with start(settings) as one:
        yield one


def exchange(running: Running, head: str, body: bytes = b"", *, end: str = "\r\n\r\n") -> str:
    """Send raw bytes; return all that comes until the server closes."""
    port = int(running.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall((head.replace("\n", "\r\n") + end).encode() + body)
        return b"".join(iter(lambda: connection.recv(65_536), b"")).decode()


@pytest.mark.parametrize("path", ["/health", *PAGE_FILES, "/metrics", "/v1/models", "/live"])
def test_what_can_be_read_has_a_head(running: Running, path: str) -> None:
    said = exchange(running, f"HEAD {path} HTTP/1.1\nHost: localhost\nConnection: close")
    head, _, body = said.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 ") and not body
    if path != "/live":  # which has no end, and its head has one
        with running.http() as http:
            whole = http.get(path)
        assert path == "/metrics" or f"content-length: {len(whole.content)}" in head.lower()


def test_a_wrong_method_is_told_the_right_ones(running: Running) -> None:
    with running.http() as http:
        for method, path, allowed in [
            ("POST", "/health", "GET, HEAD"),
            ("DELETE", "/", "GET, HEAD"),
            ("GET", "/v1/completions", "POST"),
            ("PUT", "/v1/models/demo", "GET, HEAD"),
        ]:
            answer = http.request(method, path)
            assert (answer.status_code, answer.headers.get("allow")) == (405, allowed), f"{method} {path}"


def test_a_refusal_can_be_read_by_a_friends_page(keyed: Running, running: Running) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": "a", "max_tokens": 1}
    with keyed.http(headers={"Origin": FRIEND}) as http:
        refused = {
            401: http.get("/v1/models"),
            413: http.post("/v1/completions", json={"prompt": "x" * 2000}, headers=key),
            431: http.get("/v1/models", headers={f"X-{i}": "1" for i in range(30)}),
            404: http.get("/nowhere", headers=key),
            400: http.post("/v1/completions", json={"nonsense": 1}, headers=key),
        }
        keyed.service.draining = True
        refused[503] = http.post("/v1/completions", json=body, headers=key)
        keyed.service.draining = False
        long = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=long, headers=key) as streamed:
            lines = streamed.iter_lines()
            next(lines)
            refused[429] = http.post("/v1/completions", json=body, headers=key)
    keyed.wait_until_idle()
    for status, answer in refused.items():
        assert answer.status_code == status
        assert answer.headers.get("access-control-allow-origin") == FRIEND, f"{status} has no CORS headers"
        assert "retry-after" in answer.headers["access-control-expose-headers"].lower()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET /health", 400),
        ("\x16\x03\x01\x02", 400),
        ("GET /health HTTP/1.1\nHost: localhost\nOrigin: {0}\nX-Request-Id: mine\nno colon", 400),
        ("GET /health HTTP/1.1\nOrigin: {0}", 400),
        ("POST /generate HTTP/1.1\nHost: localhost\nContent-Length: many", 400),
        ("GET /health HTTP/1.1\nHost: localhost\nOrigin: {0}\nX-Request-Id: mine\nCookie: {1}", 431),
        ("GET /health HTTP/1.1\nOrigin: http://other.example\nX-Request-Id: mine\nCookie: {1}", 431),
    ],
)
def test_what_is_no_http_is_refused_like_all_else(keyed: Running, head: str, status: int) -> None:
    """They came from uvicorn: plain text, no id, and no page could read them."""
    end = "" if status == 431 else "\r\n\r\n"  # one that comes whole is the guard's
    said = exchange(keyed, head.format(FRIEND, "x" * 30_000), end=end)
    told, _, body = said.partition("\r\n\r\n")
    assert told.startswith(f"HTTP/1.1 {status} ") and "\r\nconnection: close" in told.lower(), said
    assert "\r\nx-request-id: " in told.lower(), told
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert "bytearray" not in body, "the parser's insides are told"
    if status == 431:  # so far its headers can be read
        assert "\r\nx-request-id: mine" in told.lower(), told
        assert (f"\r\naccess-control-allow-origin: {FRIEND}" in told.lower()) == ("other" not in head), told


@pytest.mark.parametrize("stream", [False, True])
def test_a_body_that_breaks_its_framing_ends_the_request(
    running: Running, until: Any, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In the midst of a chunked body; and once the answer has begun, when nobody reads what is sent."""
    head = "POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json"
    body = json.dumps({"prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}).encode()
    if stream:
        said = exchange(running, f"{head}\nContent-Length: {len(body)}", body + b"no request\r\n\r\n")
        assert said.startswith("HTTP/1.1 200 ") and "[DONE]" in said
        assert "HTTP/1.1 400 " in said.partition("[DONE]")[2]
    else:
        said = exchange(running, f"{head}\nTransfer-Encoding: chunked", b"zz\r\n{}\r\n")
        assert said.startswith("HTTP/1.1 400 ") and said.count("content-length") == 1
    until(lambda: not running.server.server_state.tasks, "the request to end")
    assert "Traceback" not in caplog.text, caplog.text
    running.wait_until_idle()


def test_options_tell_what_there_is(keyed: Running) -> None:
    """Of the server, and of a path; they were a 404 and a 405."""
    for target, allowed in [
        ("*", "GET, HEAD, POST, OPTIONS"),
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v1/completions", "POST, OPTIONS"),
    ]:
        said = exchange(keyed, f"OPTIONS {target} HTTP/1.1\nHost: localhost\nConnection: close").lower()
        assert said.startswith("http/1.1 204 ") and said.endswith("\r\n\r\n"), said
        assert f"\r\nallow: {allowed}\r\n".lower() in said and "\r\nx-request-id: " in said, said
    said = exchange(keyed, "OPTIONS /nowhere HTTP/1.1\nHost: localhost\nConnection: close")
    assert said.startswith("HTTP/1.1 404 ")


def test_a_preflight_lets_an_sdks_own_headers_through(keyed: Running) -> None:
    names = "authorization,content-type,x-stainless-lang,x-stainless-retry-count,x-api-key,x-request-id"
    asked = {
        "Origin": FRIEND,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": names,
    }
    with keyed.http() as http:
        answer = http.options("/v1/chat/completions", headers=asked)
        assert answer.status_code == 200 and answer.headers["access-control-allow-headers"] == names
        other = http.options("/v1/chat/completions", headers={**asked, "Origin": "http://other.example"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LocalHost:80", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
    ],
)
def test_a_page_that_rebinds_its_name_to_us_is_refused(running: Running, host: str, status: int) -> None:
    for path in ("/", "/v1/models"):
        said = exchange(running, f"GET {path} HTTP/1.1\nHost: {host}\nConnection: close")
        assert said.startswith(f"HTTP/1.1 {status} "), said[:300]


def test_with_a_key_any_host_will_do(keyed: Running) -> None:
    with keyed.http(headers={"Host": "proxy.example", "Authorization": f"Bearer {KEY}"}) as http:
        assert http.get("/v1/models").status_code == 200


def test_two_lengths_end_the_connection(running: Running) -> None:
    """What follows may be somebody's request in the eyes of a proxy that took the other length."""
    head = (
        "POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
        "Content-Length: 5\nTransfer-Encoding: chunked"
    )
    said = exchange(running, head, b"0\r\n\r\nGET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert said.startswith("HTTP/1.1 400 ") and "connection: close" in said.lower()
    assert said.count("HTTP/1.1") == 1, "the smuggled request was answered"


def test_a_target_may_be_whole(running: Running) -> None:
    for target, host, status in [
        ("http://localhost:8000/v1/models?a=b", "localhost", 200),
        ("HTTP://localhost", "localhost", 200),
        ("http://localhost/v1%2Fmodels", "evil.example", 200),
        ("http://evil.example/v1/models", "localhost", 403),
        ("ftp://localhost/v1/models", "localhost", 404),
        ("*", "localhost", 404),
    ]:
        said = exchange(running, f"GET {target} HTTP/1.1\nHost: {host}\nConnection: close")
        assert said.startswith(f"HTTP/1.1 {status} "), f"{target}: {said[:200]}"


def test_a_trailing_slash_is_not_redirected(running: Running) -> None:
    with running.http() as http:
        for path in ("/v1/models/", "/health/", "/v1/completions/"):
            assert http.get(path).status_code == 404, path


def test_a_request_has_an_id_that_is_returned_and_logged(
    keyed: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "tiny_llm.server"), keyed.http() as http:
        for path, status in (("/health", 200), ("/v1/models", 401)):
            answer = http.get(path, headers={"X-Request-Id": "my-id.7"})
            assert (answer.status_code, answer.headers["x-request-id"]) == (status, "my-id.7")
            assert f"my-id.7 GET {path}: {status} " in caplog.text
        made = {http.get("/health").headers["x-request-id"] for _ in range(3)}
        assert len(made) == 3 and all(one.startswith("req-") for one in made)
        for wrong in (b"", b"a b", b"x" * 129, b"\xff"):
            given = http.get("/health", headers=[(b"X-Request-Id", wrong)]).headers["x-request-id"]
            assert given.startswith("req-"), wrong


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X-Api-Key": KEY}, 200),
        ({"X-Api-Key": KEY, "Authorization": f"Bearer {KEY}"}, 200),
        ({"X-Api-Key": "wrong"}, 401),
        ({"X-Api-Key": ""}, 401),
        ({"X-Api-Key": KEY, "Authorization": "Bearer wrong"}, 401),
        ({"X-Api-Key": KEY, "Authorization": f"Basic {KEY}"}, 401),
    ],
)
def test_a_key_may_come_as_x_api_key(keyed: Running, headers: dict[str, str], status: int) -> None:
    with keyed.http(headers=headers) as http:
        assert http.get("/v1/models").status_code == status
