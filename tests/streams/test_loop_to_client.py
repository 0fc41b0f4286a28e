"""From asyncio to a client: an event's form, back-pressure, a fault is an event, who goes stops the work."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from tiny_llm.server.events import DONE, EventStream, event_of, failure_event
from tiny_llm.server.problems import Problem
from tiny_llm.server.service import ClientGone, unless_gone

pytestmark = pytest.mark.chapter("3.6")


def test_an_event_is_one_line_and_an_empty_one() -> None:
    assert event_of({"text": "a"}) == b'data: {"text":"a"}\n\n'
    assert event_of({"text": "é"}) == 'data: {"text":"é"}\n\n'.encode(), "UTF-8, not six signs for one"


@pytest.mark.parametrize(
    "text", ["two\nlines", "a\r\nb", "a\n\ndata: [DONE]\n\nb", "a\u2028b\x85c\u2029d", '"']
)
def test_whatever_is_said_stays_in_its_line(text: str) -> None:
    event = event_of({"text": text}).decode()
    (line, empty) = event.splitlines()
    assert not empty and json.loads(line.removeprefix("data: ")) == {"text": text}


def test_what_is_large_is_one_event_too() -> None:
    value = {"logprobs": list(range(3000))}
    event = event_of(value)
    assert event.count(b"\n") == 2 and event.endswith(b"\n\n") and event.startswith(b"data: ")
    assert json.loads(event[6:]) == value


class Client:
    """What a server sends to: takes a message each time that it is let; may be gone, may say that it goes."""

    def __init__(self, *, takes: int = 1000, fails_at: int = 1000) -> None:
        self.sent: list[dict[str, Any]] = []
        self.at_once = self._under_way = 0
        self._room, self._fails_at = asyncio.Semaphore(takes), fails_at

    def take(self, count: int = 1) -> None:
        for _ in range(count):
            self._room.release()

    async def send(self, message: Any) -> None:
        self._under_way += 1
        self.at_once = max(self.at_once, self._under_way)
        await self._room.acquire()
        self._under_way -= 1
        if len(self.sent) == self._fails_at:
            raise OSError("nobody is there")
        self.sent.append(message)

    @property
    def said(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Source:
    """A stream of events that notes how far it was asked, and that it was closed."""

    def __init__(self, *events: bytes, then: Exception | None = None) -> None:
        self.made = 0
        self.is_closed = False
        self._events, self._then = events, then

    async def stream(self) -> AsyncGenerator[bytes, None]:
        try:
            for event in self._events:
                self.made += 1
                yield event
            if self._then is not None:
                raise self._then
        finally:
            await asyncio.sleep(0)  # what it cleans up may take a while
            self.is_closed = True


def test_events_go_out_one_by_one_and_the_body_ends_once(by_hand: SimpleNamespace) -> None:
    async def stream() -> None:
        source, client = Source(b"one", b"two", DONE), Client()
        await EventStream(source.stream()).stream_response(client.send)
        head, *bodies = client.sent
        assert head["type"] == "http.response.start" and head["status"] == 200
        headers = dict(head["headers"])
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert headers[b"cache-control"] == b"no-store", "nobody on the way keeps it"
        assert {body["type"] for body in bodies} == {"http.response.body"}
        assert [body["body"] for body in bodies] == [b"one", b"two", DONE, b""], "each as soon as it is there"
        assert [body["more_body"] for body in bodies] == [True, True, True, False]
        assert source.is_closed

    by_hand.run(stream())


def timeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nobody asks the running loop for a time to be woken at."""
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_at", lambda *_, **__: pytest.fail("a reader's pause may last"))


def test_the_status_goes_out_before_the_first_event_is_there(
    by_hand: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stream() -> None:
        timeless(monkeypatch)
        come, client = asyncio.Event(), Client()

        async def events() -> AsyncGenerator[bytes, None]:
            await come.wait()
            yield b"one"

        sending = asyncio.ensure_future(EventStream(events()).stream_response(client.send))
        await by_hand.settle()
        assert [message["type"] for message in client.sent] == ["http.response.start"]
        come.set()
        await sending
        assert client.said == b"one"

    by_hand.run(stream())


def test_a_slow_reader_is_waited_for_and_nothing_is_made_ahead(by_hand: SimpleNamespace) -> None:
    async def stream() -> None:
        source, client = Source(*[b"x"] * 9), Client(takes=0)
        sending = asyncio.ensure_future(EventStream(source.stream()).stream_response(client.send))
        for taken in range(5):
            await by_hand.settle()
            assert source.made == taken, "the next event is made when the last one is gone"
            client.take()
        client.take(20)
        await sending
        assert client.said == b"x" * 9 and client.at_once == 1, "one at a time"

    by_hand.run(stream())


def test_a_fault_is_an_event_then_done_and_the_end(by_hand: SimpleNamespace) -> None:
    async def stream() -> None:
        problem = Problem(500, "It broke.", code="generation_failed")
        source, client = Source(event_of({"text": "a"}), then=problem), Client()
        await EventStream(source.stream()).stream_response(client.send)
        first, fault, done, *rest = client.said.split(b"\n\n")
        assert first == b'data: {"text":"a"}' and json.loads(fault[6:])["error"]["message"] == "It broke."
        assert done == b"data: [DONE]" and rest == [b""]
        assert [message["type"] for message in client.sent].count("http.response.start") == 1
        assert [body["more_body"] for body in client.sent[1:]].count(False) == 1 and not client.sent[-1][
            "more_body"
        ]

        def told(error: Exception) -> bytes:
            return f"our words: {error}".encode()

        client = Client()
        await EventStream(Source(then=ValueError("it")).stream(), told).stream_response(client.send)
        assert client.said == b"our words: it", "an interface has words of its own for it"

    by_hand.run(stream())


def test_a_fault_tells_nothing_of_our_insides() -> None:
    assert b"secret" not in failure_event(ValueError("a secret path")) and failure_event(
        ValueError()
    ).endswith(DONE)


def test_who_is_gone_is_told_nothing_and_the_stream_is_closed(by_hand: SimpleNamespace) -> None:
    async def stream() -> None:
        source, client = Source(b"one", b"two", b"three"), Client(fails_at=2)
        response = EventStream(source.stream(), lambda _: pytest.fail("there is nobody to tell it"))
        with pytest.raises(OSError, match="nobody"):
            await response.stream_response(client.send)
        assert source.is_closed and source.made == 2, (
            "closed before it returns: not when memory is cleaned up"
        )

        source, client = Source(b"one", b"two"), Client(takes=2)
        response = EventStream(source.stream(), lambda _: pytest.fail("being cancelled is no fault"))
        sending = asyncio.ensure_future(response.stream_response(client.send))
        await by_hand.settle()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert source.is_closed and client.said == b"one"

    by_hand.run(stream())


def test_who_goes_while_an_event_is_waited_for_closes_the_stream(by_hand: SimpleNamespace) -> None:
    async def stream() -> None:
        ended = []

        async def events() -> AsyncGenerator[bytes, None]:
            try:
                await asyncio.Event().wait()
                yield b""
            finally:
                ended.append(True)

        response = EventStream(events(), lambda _: pytest.fail("being cancelled is no fault"))
        sending = asyncio.ensure_future(response.stream_response(Client().send))
        await by_hand.settle()
        sending.cancel()
        await by_hand.settle()
        assert ended and sending.cancelled()

    by_hand.run(stream())


class Asking:
    """A request whose client has sent its body, and goes when it is told to."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        self.listening = 0

    async def receive(self) -> dict[str, str]:
        self.listening += 1
        try:
            return await self.messages.get()
        finally:
            self.listening -= 1

    def go(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})


class Work:
    """Something that takes until it is let, and a moment to clean up."""

    def __init__(self) -> None:
        self.done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ends: list[str] = []

    async def do(self) -> str:
        try:
            said = await self.done
            self.ends.append("done")
            return said
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            self.ends.append("cancelled")
            raise


def test_work_that_is_done_is_returned_and_nobody_listens_any_more(by_hand: SimpleNamespace) -> None:
    async def wait() -> None:
        asking, work = Asking(), Work()
        waiting = asyncio.ensure_future(unless_gone(asking, work.do()))  # type: ignore[arg-type]
        asking.messages.put_nowait({"type": "http.request"})  # more of a body: not that it goes
        await by_hand.settle()
        assert not waiting.done() and asking.listening == 1
        work.done.set_result("answer")
        assert await waiting == "answer"
        assert not asking.listening, "else it takes the next message that another one waits for"

    by_hand.run(wait())


def test_work_stops_when_the_client_goes(by_hand: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait() -> None:
        timeless(monkeypatch)
        asking, work = Asking(), Work()
        waiting = asyncio.ensure_future(unless_gone(asking, work.do()))  # type: ignore[arg-type]
        await by_hand.settle()
        asking.go()
        with pytest.raises(ClientGone):
            await waiting
        assert work.ends == ["cancelled"], "and has ended when that is said"

    by_hand.run(wait())


def test_what_work_raises_is_raised(by_hand: SimpleNamespace) -> None:
    async def wait() -> None:
        asking, work = Asking(), Work()
        work.done.set_exception(Problem(400, "No."))
        with pytest.raises(Problem, match="No"):
            await unless_gone(asking, work.do())  # type: ignore[arg-type]
        assert not asking.listening

    by_hand.run(wait())


def test_an_answer_that_is_there_when_the_client_goes_is_taken(by_hand: SimpleNamespace) -> None:
    async def wait() -> None:
        asking, work = Asking(), Work()
        asking.go()
        work.done.set_result("answer")
        assert await unless_gone(asking, work.do()) == "answer"  # type: ignore[arg-type]
        assert work.ends == ["done"]

    by_hand.run(wait())


def test_who_is_stopped_while_waiting_stops_both(by_hand: SimpleNamespace) -> None:
    async def wait() -> None:
        asking, work = Asking(), Work()
        waiting = asyncio.ensure_future(unless_gone(asking, work.do()))  # type: ignore[arg-type]
        await by_hand.settle()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert work.ends == ["cancelled"] and not asking.listening

    by_hand.run(wait())
