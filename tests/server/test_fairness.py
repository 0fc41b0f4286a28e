"""Nobody's request holds up the others: how late /health and other streams are beside the worst bodies."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.server.answers import WrittenArray, dumped, dumps
from tiny_llm.server.logprobs import LogprobWriter
from tiny_llm.server.strict_json import MAX_CONTAINERS, MAX_NAMES, MAX_VALUES, parse

if TYPE_CHECKING:
    import socket

    import httpx2 as httpx

    from tests.server.conftest import Process, Running

MOST_S = 0.1
TRIES = 3
MEGABYTES = "word " * 700_000
USER = [{"role": "user", "content": "A"}]
LOGPROBS = {"ignore_eos": True, "logprobs": True, "top_logprobs": 20, "messages": USER}
TEXT_LOGPROBS = {"prompt": "A", "ignore_eos": True, "logprobs": 20}
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {f"p{n}": {} for n in range(190)}}}
TOOLS = [{"type": "function", **FUNCTION, "name": f"f{n}"} for n in range(128)]
LONG_MESSAGES = [{"role": "user", "content": "x y " * 450}] * 2000
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLS = [{"role": "assistant", "content": "", "tool_calls": [CALL] * 6}] * 2000
WORST: dict[str, tuple[str, dict[str, Any], int, int]] = {
    # path, body, status, how many at a time
    "one long prompt": (COMPLETIONS, {"prompt": MEGABYTES}, 400, 1),
    "long prompts": (COMPLETIONS, {"prompt": ["word " * 12_000] * 64}, 400, 1),
    "empty arrays": (COMPLETIONS, {"prompt": [[]] * 1_000_000}, 400, 1),
    "token ids": (COMPLETIONS, {"prompt": [[5] * 4_000] * 64}, 400, 1),
    "stop strings": (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 250_000}, 400, 1),
    "biases": (COMPLETIONS, {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(60_000)), 1)}, 400, 1),
    "unknown fields": (CHAT, dict.fromkeys(map(str, range(60_000)), 1), 400, 1),
    "metadata": (CHAT, {"messages": USER, "metadata": dict.fromkeys(map(str, range(60_000)), 1)}, 400, 1),
    "one long message": (CHAT, {"messages": [{"role": "user", "content": MEGABYTES}]}, 400, 1),
    "long messages": (CHAT, {"messages": LONG_MESSAGES}, 400, 1),
    "many calls": (CHAT, {"messages": CALLS}, 400, 1),
    "a long input": (RESPONSES, {"input": MEGABYTES}, 400, 1),
    "long items": (RESPONSES, {"input": LONG_MESSAGES}, 400, 1),
    "tools": (
        RESPONSES,
        {"input": "A", "tools": TOOLS, "tool_choice": "none", "max_output_tokens": 3},
        200,
        2,
    ),
    "a long text": ("/generate", {"prompt": MEGABYTES}, 400, 1),
    "a long text to tokenize": ("/tokenize", {"prompt": MEGABYTES}, 200, 2),
    "long messages to tokenize": ("/tokenize", {"messages": LONG_MESSAGES}, 400, 1),
    "ids to detokenize": ("/detokenize", {"tokens": [300] * 130_000}, 200, 2),
    "log-probabilities": (CHAT, {**LOGPROBS, "n": 32, "max_tokens": 300}, 200, 1),
    "log-probabilities in streams": (CHAT, {**LOGPROBS, "n": 4, "max_tokens": 150, "stream": True}, 200, 8),
    "a text's log-probabilities": (COMPLETIONS, {**TEXT_LOGPROBS, "n": 32, "max_tokens": 100}, 200, 1),
    "a text's log-probabilities, streamed": (
        COMPLETIONS,
        {**TEXT_LOGPROBS, "n": 32, "max_tokens": 100, "stream": True},
        200,
        1,
    ),
    "log-probabilities by id": ("/generate", {**TEXT_LOGPROBS, "n": 32, "max_tokens": 100}, 200, 1),
    "log-probabilities by id, streamed": (
        "/generate",
        {**TEXT_LOGPROBS, "n": 32, "max_tokens": 100, "stream": True},
        200,
        1,
    ),
    "responses with log-probabilities": (
        RESPONSES,
        {
            "input": "A",
            "ignore_eos": True,
            "max_output_tokens": 300,
            "stream": True,
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 20,
        },
        200,
        8,
    ),
    "echoed log-probabilities": (
        COMPLETIONS,
        {"prompt": ["A b " * 200] * 8, "max_tokens": 0, "echo": True, "logprobs": 20},
        200,
        1,
    ),
}


class _Watch:
    """Asks for /health again and again; ``longest_s`` is how long an answer took at most.

    No longer than the server computed meanwhile, though, where the system tells: while it waits for a core,
    because others have them all, it holds up nobody.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._connection = process.connect()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.longest_s = 0.0

    def _run(self) -> None:
        while not self._ended.wait(0.005):
            began, computed_s = time.perf_counter(), self._process.computed_s()
            self._connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert self._connection.recv(4096), "the server hung up"
            took_s = time.perf_counter() - began
            computed_s = self._process.computed_s() - computed_s
            self.longest_s = max(self.longest_s, min(took_s, computed_s))

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._connection.close()


class _Stream(_Watch):
    """The same of a stream: ``longest_s`` is between two of its events."""

    def _run(self) -> None:
        data = json.dumps({"prompt": "A", "max_tokens": 900, "ignore_eos": True, "stream": True}).encode()
        while not self._ended.is_set():
            with self._process.send("/generate", data) as connection:
                connection.recv(2**16)
                began, computed_s = time.perf_counter(), self._process.computed_s()
                while not self._ended.is_set() and connection.recv(2**16):
                    now, then_s = time.perf_counter(), self._process.computed_s()
                    self.longest_s = max(self.longest_s, min(now - began, then_s - computed_s))
                    began, computed_s = now, then_s


@pytest.fixture(scope="module")
def alone(start_process: Any) -> Iterator[Process]:
    one = start_process()
    yield one
    one.end()


def _status(connection: socket.socket) -> int:
    """Read all of an answer; return its status."""
    with connection:
        first = connection.recv(2**16)
        while connection.recv(2**16):
            pass
    return int(first.split()[1])


def _lateness(
    process: Process, path: str, data: bytes, times: int, watching: type[_Watch] = _Watch
) -> tuple[float, set[int]]:
    with watching(process) as watch, ThreadPoolExecutor(times) as clients:
        answers = list(clients.map(lambda _: _status(process.send(path, data)), range(times)))
    return watch.longest_s, set(answers)


def _require_soon(process: Process, case: str, most_s: float, watching: type[_Watch]) -> None:
    path, body, status, times = WORST[case]
    data, seen = json.dumps(body, separators=(",", ":")).encode(), []
    assert len(data) < 4 * 2**20
    for _ in range(TRIES):
        late, answers = _lateness(process, path, data, times, watching)
        assert answers == {status}
        seen.append(late)
        if seen[-1] < most_s:
            return
    pytest.fail(f"{case}: {watching.__name__} waited {seen} s, at most {most_s} s each time")


@pytest.mark.slow
@pytest.mark.parametrize("case", WORST)
def test_the_worst_bodies_make_nobody_late(alone: Process, case: str) -> None:
    _require_soon(alone, case, MOST_S, _Watch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["echoed log-probabilities", "log-probabilities in streams", "a long text to tokenize", "stop strings"],
)
def test_a_stream_goes_on_beside_the_worst_bodies(alone: Process, case: str) -> None:
    """A step may take as long as the scheduler lets it, and its event comes no later than /health does."""
    _require_soon(alone, case, SchedulerSettings().max_step_ms / 1e3 + MOST_S, _Stream)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what a process holds")
def test_memory_that_a_large_body_took_goes_back(alone: Process, until: Any) -> None:
    """But for some: Python's own pages, of which each still has an object. Of 250 MB they are 30 to 80."""
    small, large = ({"prompt": "word " * count} for count in (10_000, 700_000))
    assert _status(alone.ask(small, "/tokenize")) == 200
    before = alone.resident_bytes()
    for _ in range(2):
        assert _status(alone.ask(large, "/tokenize")) == 200
    until(lambda: alone.resident_bytes() < before + 2**27, "memory to go back")


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"a": [], "b": {}},
        list(range(5000)),
        [[1, [2, {"x": [3, [4, [5, [6, [7]]]]]}]], "a", None],
        {"é": ["\u2028"]},
    ],
)
def test_json_in_pieces_is_the_same_json(value: object) -> None:
    assert b"".join(dumped(value)) == dumps(value)


def test_a_written_array_is_the_array_of_its_items() -> None:
    rows = [{"a": [n] * 30, "b": {"c": None}} for n in range(500)]
    array, empty = WrittenArray(lambda: (dumps(row).decode() for row in rows)), WrittenArray(lambda: ())
    for _ in range(2):  # as often as asked
        assert b"".join(dumped({"x": array, "y": [empty]})) == dumps({"x": rows, "y": [[]]})


def test_log_probabilities_are_written_as_json_writes_them(running: Running) -> None:
    tokenizer = running.service.llm.tokenizer
    rows = [{n: -n / 7, n + 1: -0.1, n + 2: -0.1, n + 3: -math.inf} for n in range(2040)]

    def entry(token: int, value: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        told = max(round(value, 6), -9999.0)
        return {"token": data.decode("utf-8", "replace"), "logprob": told, "bytes": list(data)}

    expected = []
    for n, row in enumerate(rows):
        best = sorted(row, key=lambda token, row=row: -row[token])[:3]  # type: ignore[misc]
        top = [entry(token, row[token]) for token in best]
        expected.append({**entry(n, row[n]), "top_logprobs": top})
    assert b"".join(dumped(LogprobWriter(tokenizer, 3).chat(rows))) == dumps(expected)
    alone = [{**entry(n, row[n]), "top_logprobs": []} for n, row in enumerate(rows)]
    assert b"".join(dumped(LogprobWriter(tokenizer, 0).chat(rows))) == dumps(alone)


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("prompt", [[]] * (MAX_CONTAINERS + 1), "objects and arrays"),
        ("prompt", [1] * (MAX_VALUES + 2), "values"),
        ("metadata", {str(number): 1 for number in range(MAX_NAMES + 1)}, "fields"),
    ],
)
def test_a_body_of_too_many_parts_is_refused_before_it_is_parsed(
    http: httpx.Client, field: str, value: object, part: str
) -> None:
    body = {"max_tokens": 1, "prompt": "a", field: value}
    told = http.post("/v1/completions", json=body)
    assert told.status_code == 400, told.text[:300]
    assert "The body has more than" in told.text and part in told.text


@pytest.mark.parametrize(
    "text", ["[{" * MAX_CONTAINERS, '\\"[' * MAX_CONTAINERS, "é[" * MAX_CONTAINERS, "\\" * 2**17]
)
def test_brackets_within_a_text_are_no_parts(text: str) -> None:
    assert parse(dumps({"a": [text, text[:-1]]})) == {"a": [text, text[:-1]]}


def test_a_large_body_that_is_wrong_names_the_same_field_as_a_small_one(http: httpx.Client) -> None:
    wrong = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "image"}]}]}
    told = [http.post("/v1/chat/completions", json={**wrong, "user": "u" * size}).json() for size in (1, 400)]
    large = http.post("/v1/chat/completions", json={**wrong, "grammar": "g" * 100_000}).json()
    assert told[0] == told[1] == large
    assert large["error"]["param"] == "messages[1].content[0].type"
