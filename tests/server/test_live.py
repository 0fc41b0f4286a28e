"""GET / and GET /live: who may see what, and that watching holds nothing up."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tiny_llm.server import live
from tiny_llm.server.page_files import HEADERS, PAGE_FILES
from tiny_llm.server.settings import ServerSettings

if TYPE_CHECKING:
    from tests.server.conftest import Running

LONG = {"prompt": "A story about zimbro.", "max_tokens": 900, "ignore_eos": True, "stream": True}


def pictures(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    return (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {"))


def test_the_page_needs_no_key_and_the_feed_does(start: Any) -> None:
    with start(ServerSettings(api_keys=("a-secret",))) as one, one.http() as http:
        for path in PAGE_FILES:
            answer = http.get(path)
            assert answer.status_code == 200 and "a-secret" not in answer.text, path
            assert all(answer.headers[name] == value for name, value in HEADERS.items()), path
        assert http.get("/live").status_code == 401
        for path in ("/page/", "/page/..%2fapp.py", "/page/../app.py", "/page/index.html"):
            assert http.get(path).status_code == 401, path
        headers = {"Authorization": "Bearer a-secret"}
        with http.stream("GET", "/live", headers=headers) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert next(pictures(answer.iter_lines()))["rows"] == []


def test_the_feed_shows_a_request_come_and_go_and_no_word_of_it(start: Any) -> None:
    with (
        start() as running,
        running.http() as http,
        running.http() as other,
        http.stream("GET", "/live") as feed,
    ):
        lines = feed.iter_lines()
        seen = pictures(lines)
        before = next(seen)
        running.slow_down(0.002)
        with other.stream("POST", "/v1/completions", json=LONG) as answer:
            tokens = answer.iter_lines()
            next(tokens)
            busy = next(one for one in seen if one["rows"])
            assert busy["rows"][0][1] == 1 and busy["blocks"]["used"] > 0
            assert busy["cells"] != before["cells"] and "zimbro" not in json.dumps(busy)
        after = next(one for one in seen if not one["rows"])
        assert after["generation_tokens"] > before["generation_tokens"]


def test_one_picture_is_for_all_who_watch_and_none_is_taken_for_nobody(
    start: Any, until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    original = live.picture
    monkeypatch.setattr(live, "picture", lambda engine: taken.append(1) or original(engine))
    monkeypatch.setattr(live, "PERIOD_S", 0.05)
    with start() as one:
        feeds: list[list[bytes]] = []

        def watch() -> None:
            with one.http() as http, http.stream("GET", "/live") as answer:
                lines = answer.iter_lines()
                feeds.append([line for _, line in zip(range(20), lines, strict=False)])

        watchers = [threading.Thread(target=watch) for _ in range(4)]
        for watcher in watchers:
            watcher.start()
        for watcher in watchers:
            watcher.join()
        assert len(taken) < 2 * 10 + 4, "ten events each, two lines an event: not forty pictures"
        until(lambda: no_task_of(one), "the feed to end")
        count = len(taken)
        time.sleep(0.2)
        assert len(taken) == count, "nobody watches"


def no_task_of(one: Running) -> bool:
    """Whether no request is open: a watcher's response has a task of its own."""
    return not one.server.server_state.tasks


@pytest.mark.slow
def test_watchers_are_bounded(start: Any) -> None:
    with start() as one:
        opened = []
        for _ in range(live.MAX_WATCHERS):
            http = one.http()
            stream = http.stream("GET", "/live")
            opened.append((http, stream, stream.__enter__()))
        with one.http() as http:
            refused = http.get("/live")
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "too_many_watchers"
            asked = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
            assert asked.status_code == 200, "watchers take no request's place"
        for http, stream, _ in opened:
            stream.__exit__(None, None, None)
            http.close()
        with one.http() as http, http.stream("GET", "/live") as answer:
            assert next(pictures(answer.iter_lines()))


def test_a_watcher_takes_no_requests_place_and_holds_up_no_end(start: Any) -> None:
    with (
        start(ServerSettings(max_in_flight=1)) as one,
        one.http() as http,
        one.http() as other,
        http.stream("GET", "/live") as feed,
    ):
        lines = feed.iter_lines()
        next(lines)
        assert other.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        one.service.draining = True
        assert len(list(lines)) < 8, "it ends by itself, and the drain need not wait for it"


def test_who_no_longer_waits_for_a_call_does_not_end_the_engine(running: Running) -> None:
    """A /metrics that timed out set the result of a cancelled future, which ended the engine's thread."""

    async def leave() -> None:
        began, go_on = threading.Event(), threading.Event()
        first = asyncio.ensure_future(running.engine.call(lambda _: (began.set(), go_on.wait(10))))
        second = asyncio.ensure_future(running.engine.call(lambda _: 1))
        await asyncio.to_thread(began.wait, 10)
        for call in (first, second):
            call.cancel()
        go_on.set()
        assert await running.engine.call(lambda _: 2) == 2

    asyncio.run(leave())
    assert running.engine.alive
