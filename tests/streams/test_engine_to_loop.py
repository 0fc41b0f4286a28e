"""From the engine's thread to asyncio: nobody polls, a step is one call, who leaves is cancelled."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from tiny_llm.data import Chunk
from tiny_llm.engine.async_llm import EngineDeadError, StoppedError, _Asked, _hand_over, _Mailbox
from tiny_llm.errors import RequestError
from tiny_llm.sampling_params import SamplingParams

pytestmark = pytest.mark.chapter("3.6")


def texts(items: list[tuple[int, Any]]) -> list[str]:
    return [item.text for _, item in items]


def test_all_that_has_come_is_taken_at_once_and_in_order(by_hand: SimpleNamespace) -> None:
    async def look() -> None:
        box = _Mailbox()
        for word in "abc":
            box.put((0, Chunk(word)))
        first = await box.take()
        box.put((0, Chunk("d")))
        assert texts(first) == ["a", "b", "c"], "what was taken is the taker's: it does not grow"
        assert texts(await box.take()) == ["d"], "and is not there a second time"

    by_hand.run(look())


def test_who_finds_nothing_waits_without_looking_again(
    by_hand: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait() -> None:
        box = _Mailbox()
        monkeypatch.setattr(
            box.loop, "call_at", lambda *_, **__: pytest.fail("it asks for a time to look again")
        )
        taking = asyncio.ensure_future(box.take())
        await by_hand.settle()
        assert not taking.done(), "there is nothing to take"
        box.put((0, Chunk("a")))
        box.put((0, Chunk("b")))  # before the taker has had its turn
        assert texts(await taking) == ["a", "b"], "one wake-up, all that came until then"
        later = asyncio.ensure_future(box.take())
        box.loop.call_soon(box.put, (0, Chunk("c")))
        assert texts(await later) == ["c"], "it waits anew"

    by_hand.run(wait())


def test_who_gave_up_waiting_loses_nothing(by_hand: SimpleNamespace) -> None:
    async def give_up() -> None:
        box = _Mailbox()
        taking = asyncio.ensure_future(box.take())
        await by_hand.settle()
        taking.cancel()
        await by_hand.settle()
        box.put((0, Chunk("a")))
        assert texts(await box.take()) == ["a"]

    by_hand.run(give_up())


class Loop:
    """An event loop that only notes what it is asked for."""

    def __init__(self, *, is_closed: bool = False) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.is_closed = is_closed

    def call_soon_threadsafe(self, call: Any, *given: Any) -> None:
        if self.is_closed:
            raise RuntimeError("Event loop is closed")
        self.asked.append((call, *given))

    def run(self) -> None:
        for call, *given in self.asked:
            call(*given)


def boxes(*loops: Loop) -> tuple[list[_Asked], list[list[tuple[int, Any]]]]:
    """A request with a mailbox in each of these loops, and what is put there."""
    asked, came = [], []
    for number, loop in enumerate(loops):
        items: list[tuple[int, Any]] = []
        box = SimpleNamespace(loop=loop, put=items.append)
        asked.append(_Asked(number, [1], SamplingParams(), {}, box))  # type: ignore[arg-type]
        came.append(items)
    return asked, came


def test_a_step_is_one_call_of_each_loop() -> None:
    one, other = Loop(), Loop()
    asked, came = boxes(one, other, one)
    error = RequestError("it breaks")
    _hand_over([(asked[0], Chunk("a")), (asked[1], Chunk("b")), (asked[2], Chunk("c")), (asked[0], error)])
    assert not any(came), "on the engine's thread nothing is put: mailboxes are their loop's"
    assert len(one.asked) == len(other.asked) == 1, "one wake-up, however many chunks"
    one.run()
    assert texts(came[0][:1]) == ["a"] and came[0][1] == (0, error), "in order, with the prompt's number"
    assert [number for number, _ in came[2]] == [2] and texts(came[2]) == ["c"] and not came[1]
    other.run()
    assert texts(came[1]) == ["b"]
    assert _hand_over([]) is None, "a step of prompts alone has no chunks"


def test_a_loop_that_is_closed_costs_the_others_nothing() -> None:
    closed, alive = Loop(is_closed=True), Loop()
    asked, came = boxes(closed, alive)
    _hand_over((one, Chunk("a")) for one in asked)
    alive.run()
    assert texts(came[1]) == ["a"] and not came[0]


def test_a_chunk_wakes_the_loop_of_another_thread(by_hand: SimpleNamespace) -> None:
    """It sleeps, with nothing else to do: who only appends to its list is not heard."""

    async def wait() -> list[str]:
        box = _Mailbox()
        asked = _Asked(0, [1], SamplingParams(), {}, box)
        engine = threading.Timer(0.01, _hand_over, ([(asked, Chunk("a")), (asked, Chunk("b"))],))
        engine.start()
        try:
            return texts(await asyncio.wait_for(box.take(), 8))
        finally:
            engine.join()

    assert by_hand.run(wait()) == ["a", "b"]


def test_chunks_come_with_their_prompts_numbers_until_all_answers_ended(by_hand: SimpleNamespace) -> None:
    async def ask() -> None:
        engine, came, began = by_hand.engine, list[list[tuple[int, Chunk]]](), time.perf_counter()

        async def read() -> None:
            async for some in engine.streams([[5], [6]], SamplingParams(n=2), priority=3):
                came.append(some)

        reading = asyncio.ensure_future(read())
        await by_hand.settle()
        assert not engine.added and len(engine.jobs) == 1, "the engine's thread adds them, in one turn"
        engine.work()
        assert [ids for ids, _ in engine.added] == [[5], [6]]
        assert all(options["priority"] == 3 for _, options in engine.added)
        came_at = engine.added[0][1]["arrival_s"]
        assert began <= came_at <= time.perf_counter(), "by the engine's clock, when it was asked"
        engine.work((1, by_hand.piece("a", 1)), (2, by_hand.piece("b")))
        engine.work((1, by_hand.last("c", 0)))
        await by_hand.settle()
        told = [[(number, chunk.index, chunk.text) for number, chunk in some] for some in came]
        assert told == [[(0, 1, "a"), (1, 0, "b"), (0, 0, "c")]], "what has come meanwhile comes together"
        engine.work((1, by_hand.last("d", 1)), (2, by_hand.last("e", 1)))
        await by_hand.settle()
        assert not reading.done(), "one of four answers is missing"
        engine.work((2, by_hand.last("f", 0, "length")))
        await reading
        assert [texts(some) for some in came[1:]] == [["d", "e"], ["f"]]
        assert not engine.jobs, "all has ended: there is nothing to cancel"

    by_hand.run(ask())


def test_an_engine_that_is_quicker_than_who_asks_is_heard(by_hand: SimpleNamespace) -> None:
    """It had made the whole answer before its caller went on, who then waited for none."""

    async def ask() -> None:
        engine = by_hand.engine

        def at_once(job: Any) -> None:
            job()
            engine.work((1, by_hand.last("a")))

        engine.post = at_once
        assert [texts(some) async for some in engine.streams([[5]])] == [["a"]]

    by_hand.run(ask())


def test_one_wrong_prompt_means_that_none_is_asked(by_hand: SimpleNamespace) -> None:
    async def ask() -> None:
        with pytest.raises(RequestError, match="empty"):
            async for _ in by_hand.engine.streams([[5], []]):
                pass
        assert not by_hand.engine.jobs

    by_hand.run(ask())


def test_each_stream_has_a_mailbox_of_its_own_and_no_turn_waits_for_a_reader(
    by_hand: SimpleNamespace,
) -> None:
    async def ask() -> None:
        engine = by_hand.engine
        slow, quick = engine.streams([[5]]), engine.streams([[6]])
        first = [asyncio.ensure_future(anext(stream)) for stream in (slow, quick)]
        await by_hand.settle()
        engine.work()
        for word in "abc":
            engine.work((1, by_hand.piece(word)), (2, by_hand.piece(word.upper())))
            await by_hand.settle()
        assert [texts(await one) for one in first] == [["a"], ["A"]]
        engine.work((1, by_hand.last("d")), (2, by_hand.last("D")))
        await by_hand.settle()
        assert not engine.open, "its own end does not wait for who reads"
        assert [texts(some) async for some in quick] == [["B", "C", "D"]]
        assert [texts(some) async for some in slow] == [["b", "c", "d"]]

    by_hand.run(ask())


async def begun(
    by_hand: SimpleNamespace, *prompts: list[int]
) -> AsyncGenerator[list[tuple[int, Chunk]], None]:
    """A stream whose first chunk has been read."""
    stream: AsyncGenerator[list[tuple[int, Chunk]], None] = by_hand.engine.streams(prompts)
    first = asyncio.ensure_future(anext(stream))
    await by_hand.settle()
    by_hand.engine.work()
    by_hand.engine.work((1, by_hand.piece("a")))
    await first
    return stream


def test_who_leaves_is_cancelled_on_the_engines_thread(by_hand: SimpleNamespace) -> None:
    async def leave() -> None:
        engine = by_hand.engine
        stream = await begun(by_hand, [5], [6])
        stays = asyncio.ensure_future(anext(engine.streams([[7]])))
        await by_hand.settle()
        engine.work()
        await stream.aclose()
        assert not engine.cancelled, (
            "the engine may be in the midst of a step: it is asked to, and does it after"
        )
        engine.work()
        assert engine.cancelled == [1, 2] and engine.open == 1, "both of its prompts, and nobody else's"
        engine.work((3, by_hand.last("x")))
        assert texts(await stays) == ["x"]

    by_hand.run(leave())


def test_who_is_cancelled_while_it_waits_has_left_too(by_hand: SimpleNamespace) -> None:
    async def leave() -> None:
        stream = await begun(by_hand, [5])
        waiting = asyncio.ensure_future(anext(stream))
        await by_hand.settle()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        by_hand.engine.work()
        assert by_hand.engine.cancelled == [1]

        unread = by_hand.engine.streams([[6]])
        first = asyncio.ensure_future(anext(unread))
        await by_hand.settle()
        first.cancel()
        await by_hand.settle()
        by_hand.engine.work()
        assert by_hand.engine.cancelled == [1, 2], "added and cancelled in one turn, in that order"

    by_hand.run(leave())


def test_only_who_has_ended_is_not_cancelled(by_hand: SimpleNamespace) -> None:
    async def leave() -> None:
        engine = by_hand.engine
        stream = await begun(by_hand, [5], [6])
        engine.work((1, by_hand.last("b")))
        await anext(stream)
        await stream.aclose()
        engine.work()
        assert engine.cancelled == [2]

    by_hand.run(leave())


def test_an_error_comes_after_what_came_before_it(by_hand: SimpleNamespace) -> None:
    async def ask() -> None:
        engine = by_hand.engine
        stream = await begun(by_hand, [5], [6])
        engine.work((1, by_hand.piece("b")))
        engine._tell_all("The engine broke.")
        assert texts(await anext(stream)) == ["b"]
        with pytest.raises(EngineDeadError, match="broke"):
            await anext(stream)

    by_hand.run(ask())


def test_an_error_is_raised_alone_where_nothing_came_before_it(by_hand: SimpleNamespace) -> None:
    async def ask() -> None:
        engine = by_hand.engine
        stream = await begun(by_hand, [5])
        engine._stop_all("The server stops.")
        with pytest.raises(StoppedError, match="stops"):
            await anext(stream)
        engine.work()
        assert engine.cancelled == [1], "it was told, and has left: what it asked for is not computed on"

    by_hand.run(ask())


def test_a_refusal_reaches_its_caller_and_cancels_what_was_taken(by_hand: SimpleNamespace) -> None:
    async def ask() -> None:
        engine = by_hand.engine
        first = asyncio.ensure_future(anext(engine.streams([[5], [404]])))
        await by_hand.settle()
        engine.work()
        with pytest.raises(RequestError, match="refuses"):
            await first
        engine.work()
        assert engine.cancelled == [1] and not engine.open

    by_hand.run(ask())


def test_who_leaves_a_dead_engine_is_not_told_so(by_hand: SimpleNamespace) -> None:
    async def leave() -> None:
        stream = await begun(by_hand, [5])
        by_hand.engine.is_dead = True
        await stream.aclose()  # nothing is left to be cancelled
        with pytest.raises(EngineDeadError):
            await anext(by_hand.engine.streams([[6]]))

    by_hand.run(leave())


def test_what_is_supplied_is_there_before_the_engine_is_asked(by_hand: SimpleNamespace) -> None:
    async def ask() -> None:
        engine, asked, go_on = by_hand.engine, list[list[int]](), asyncio.Event()

        async def supply(ids: list[int], params: SamplingParams, options: Any) -> None:
            asked.append(ids)
            await go_on.wait()

        engine.supply = supply
        leaving, staying = engine.streams([[4]]), engine.streams([[5], [6]])
        first = [asyncio.ensure_future(anext(stream)) for stream in (leaving, staying)]
        await by_hand.settle()
        assert asked == [[4], [5], [6]] and not engine.jobs, "all at a time, and until then nothing is posted"
        first[0].cancel()
        await by_hand.settle()
        assert not engine.jobs, "who leaves before the engine was asked has nothing to cancel"
        go_on.set()
        await by_hand.settle()
        engine.work()
        engine.work((2, by_hand.piece("a")))
        assert texts(await first[1]) == ["a"]

    by_hand.run(ask())
