"""Nobody's request holds up the others: how long the event loop is kept by the worst bodies of each route."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tiny_llm.server.answers import dumped, dumps
from tiny_llm.server.settings import ServerSettings

if TYPE_CHECKING:
    from tests.server.conftest import Running

MOST_S = 0.1
MEGABYTES = "word " * 700_000
CHAT = {
    "messages": [{"role": "user", "content": "A"}],
    "n": 16,
    "max_tokens": 200,
    "ignore_eos": True,
    "logprobs": True,
    "top_logprobs": 20,
}
WORST: dict[str, tuple[str, dict[str, Any], int]] = {
    "one long prompt": ("/v1/completions", {"prompt": MEGABYTES}, 400),
    "one long message": ("/v1/chat/completions", {"messages": [{"role": "user", "content": MEGABYTES}]}, 400),
    "a long input": ("/v1/responses", {"input": MEGABYTES}, 400),
    "a long text": ("/generate", {"prompt": MEGABYTES}, 400),
    "a long text to tokenize": ("/tokenize", {"prompt": MEGABYTES}, 200),
    "log-probabilities": ("/v1/chat/completions", CHAT, 200),
    "log-probabilities, streamed": ("/v1/chat/completions", {**CHAT, "stream": True}, 200),
}


class _Longest:
    """The longest time that a callback kept its event loop, in CPU time: steady where cores are few."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def measured(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        run = asyncio.events.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            began = time.thread_time()
            run(handle)
            took = time.thread_time() - began
            if took > 0.05:
                print(took, handle)
            self.seconds = max(self.seconds, took)

        with monkeypatch.context() as patch:
            patch.setattr(asyncio.events.Handle, "_run", timed)
            yield


@pytest.fixture(scope="module")
def alone(start: Any) -> Iterator[Running]:
    with start(ServerSettings()) as one:
        yield one


@pytest.mark.slow
@pytest.mark.parametrize("case", WORST)
def test_the_worst_bodies_keep_the_loop_for_a_moment(
    alone: Running, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    path, body, status = WORST[case]
    longest = _Longest()
    with alone.http() as http:
        assert http.get("/health").status_code == 200
        with longest.measured(monkeypatch):
            answer = http.post(path, json=body)
    assert answer.status_code == status, answer.text[:300]
    alone.wait_until_idle()
    assert longest.seconds < MOST_S, f"{case}: one callback kept the loop for {longest.seconds:.3f} s"


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
