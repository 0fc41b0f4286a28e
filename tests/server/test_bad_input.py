"""Hundreds of bad requests: each gets its status, OpenAI's body and the field's name; then all is well."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import httpx2 as httpx

    from tests.server.conftest import Running

MESSAGES = [{"role": "user", "content": "What is a KV cache?"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GOOD = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}

NO_JSON: list[bytes] = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"7",
    b'"text"',
    b"not json",
    b'{"prompt": "a"} b',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\\ud800"}',
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"messages": ' + b"[" * 150 + b"]" * 150 + b"}",
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "temperature": -Infinity}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "top_p": -1e999}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b"{'prompt': 'a'}",
    b'{"prompt": "a",}',
]

WRONG_FIELDS: list[tuple[str, object]] = [
    *[("temperature", bad) for bad in (-0.1, 101, "1", True, [1], {})],
    *[("top_p", bad) for bad in (-0.1, -1, 1.1, "0.5", False)],
    *[("top_k", bad) for bad in (-2, 1.5, "5", 2**40)],
    *[("min_p", bad) for bad in (-0.1, 1.1, "x")],
    *[("n", bad) for bad in (0, -1, 33, 10**9, 1.5, "2", True)],
    *[("max_tokens", bad) for bad in (0, -5, 1.5, "10", 2**31, 10**30)],
    *[("min_tokens", bad) for bad in (-1, "1", 2**31)],
    *[("seed", bad) for bad in (1.5, "1", 2**64, -(2**63) - 1)],
    *[("presence_penalty", bad) for bad in (-2.1, 2.1, "1")],
    *[("frequency_penalty", bad) for bad in (-2.1, 2.1, [])],
    *[("repetition_penalty", bad) for bad in (0, -1, 101, "1")],
    *[("stop", bad) for bad in (5, [5], "", [""], ["a"] * 17, {"a": 1}, "x" * 257, [["a"]])],
    *[("stop_token_ids", bad) for bad in (5, [-1], ["1"], [1.5], [2048], [2**40], list(range(65)))],
    *[
        ("logit_bias", bad)
        for bad in ([], {"a": 1}, {"1": "2"}, {"1": 101}, {"-1": 1}, {"2048": 1}, {"99999999": 1})
    ],
    ("logit_bias", {str(i): 1 for i in range(1025)}),
    *[("stream", bad) for bad in ("true", 1, [])],
    *[
        ("stream_options", bad)
        for bad in (1, {"x": 1}, {"include_usage": "yes"}, {}, {"include_usage": True})
    ],
    *[("priority", bad) for bad in (101, -101, "high", 1.5)],
    *[("ignore_eos", bad) for bad in ("no", 1)],
    *[("user", bad) for bad in (5, "x" * 513)],
    *[("cache_salt", bad) for bad in (5, "")],
    *[("model", bad) for bad in (5, ["demo"])],
]
WRONG_CHAT: list[tuple[str, object]] = [
    *[("messages", bad) for bad in ([], "hello", {}, [5], ["hi"], [{}], [{"role": "user", "content": 5}])],
    *[("messages", [{"role": role, "content": "x"}]) for role in ("robot", "", 5)],
    ("messages", [{"role": "user", "content": "x", "extra": 1}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
    ("messages", [{"role": "user", "content": ["text"]}]),
    *[("messages", [{"role": role}]) for role in ("system", "developer", "user", "tool")],
    ("messages", [{"role": "user", "content": None}]),
    ("messages", [{"role": "tool", "content": "12"}]),
    ("messages", [{"role": "user", "content": "a"}] * 2049),
    ("messages", [{"role": "user", "content": "word " * 5000}]),
    *[("logprobs", bad) for bad in (5, "yes")],
    *[("top_logprobs", bad) for bad in (21, -1, "3", 2)],
    *[("chat_template_kwargs", bad) for bad in (5, {"template": "x"}, {"enable_thinking": "yes"})],
]
WRONG_TEXT: list[tuple[str, object]] = [
    *[("prompt", bad) for bad in ("", [], [[]], 5, {}, [1, "a"], ["a", 1], [[1], "a"], [1.5], [True])],
    *[
        ("prompt", bad)
        for bad in ([2048], [-1], [2**40], [[1], [5000]], ["a"] * 65, [1] * 1024, "word " * 5000)
    ],
    *[("logprobs", bad) for bad in (21, -1, "3", True)],
    *[("echo", bad) for bad in ("yes", 1)],
]
UNSUPPORTED = (
    "best_of",
    "suffix",
    "images",
    "function_call",
    "audio",
    "modalities",
    "store",
    "nonsense",
    "Temperature",
)


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a response, after checking its shape."""
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    message = body["error"]["message"]
    assert isinstance(message, str) and 5 < len(message) <= 1000 and "\n" not in message.strip()
    return dict(body["error"])


@pytest.fixture(scope="module")
def good(running: Running) -> Any:
    """Asks something good, and requires the same answer each time."""
    with running.http() as http:
        first = http.post(CHAT, json=GOOD).json()["choices"]

        def check() -> None:
            assert http.post(CHAT, json=GOOD).json()["choices"] == first

        yield check


def post(http: httpx.Client, path: str, body: object) -> httpx.Response:
    """As JSON of Python's kind, which knows more than JSON does."""
    return http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("body", NO_JSON, ids=lambda body: repr(body[:24]))
@pytest.mark.parametrize("path", [TEXT, "/tokenize"])
def test_what_is_no_json_object_is_a_400(http: httpx.Client, good: Any, path: str, body: bytes) -> None:
    refused(http.post(path, content=body, headers={"Content-Type": "application/json"}))
    good()


@pytest.mark.parametrize(("name", "value"), WRONG_FIELDS + WRONG_CHAT, ids=lambda v: repr(v)[:30])
def test_a_wrong_field_of_a_chat_is_named(http: httpx.Client, good: Any, name: str, value: object) -> None:
    error = refused(post(http, CHAT, {**GOOD, name: value}))
    assert error["param"].split("[")[0].split(".")[0] == name, error
    good()


@pytest.mark.parametrize(("name", "value"), WRONG_FIELDS + WRONG_TEXT, ids=lambda v: repr(v)[:30])
def test_a_wrong_field_of_a_completion_is_named(
    http: httpx.Client, good: Any, name: str, value: object
) -> None:
    error = refused(post(http, TEXT, {"prompt": "a", name: value}))
    assert error["param"].split("[")[0].split(".")[0] == name, error
    good()


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("path", [TEXT, CHAT, "/generate", "/tokenize"])
def test_a_field_that_is_not_supported_is_named(http: httpx.Client, path: str, name: str) -> None:
    asked = GOOD if path == CHAT else {"prompt": "a"}
    error = refused(http.post(path, json={**asked, name: 2}))
    assert error["param"] == name and name in error["message"] and error["code"] == "unsupported_field"


@pytest.mark.parametrize(("path", "name"), [(TEXT, "prompt"), (CHAT, "messages"), ("/detokenize", "tokens")])
def test_a_missing_field_is_named(http: httpx.Client, path: str, name: str) -> None:
    assert refused(http.post(path, json={}))["param"] == name


def test_null_is_not_given(http: httpx.Client) -> None:
    body = {**GOOD, "stop": None, "n": None, "suffix": None, "logit_bias": None}
    assert http.post(CHAT, json=body).status_code == 200


def test_the_context_has_its_own_code(http: httpx.Client) -> None:
    for path, body in (
        (TEXT, {"prompt": [1] * 2000}),
        (CHAT, {"messages": [{"role": "user", "content": "a b " * 900}]}),
    ):
        assert refused(http.post(path, json=body))["code"] == "context_length_exceeded"


def test_an_unknown_model_or_path_is_a_404(http: httpx.Client) -> None:
    for path in (TEXT, "/tokenize", "/generate"):
        error = refused(http.post(path, json={"prompt": "a", "model": "../../etc/passwd"}), 404)
        assert error["code"] == "model_not_found" and error["param"] == "model"
    for path in ("/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/other", "/nowhere", "/v1"):
        refused(http.get(path), 404)
    refused(http.get(TEXT), 405)


def test_prompts_times_n_have_a_limit(http: httpx.Client) -> None:
    assert refused(http.post(TEXT, json={"prompt": ["a"] * 64, "n": 3}))["param"] == "n"


def test_template_refusals_are_about_the_messages(http: httpx.Client) -> None:
    late = [*MESSAGES, {"role": "system", "content": "late"}]
    error = refused(http.post(CHAT, json={"messages": late}))
    assert error["param"] == "messages" and "must come first" in error["message"]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_what_a_foreign_page_can_send_is_refused(http: httpx.Client, kind: str) -> None:
    """Forms reach a server on the reader's own machine without being asked; JSON does not."""
    refused(http.post(TEXT, content=b'{"prompt": "a"}', headers={"Content-Type": kind}), 415)
