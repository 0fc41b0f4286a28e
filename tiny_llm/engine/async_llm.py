"""Owns the engine's thread, and the way from asyncio to it and back. Chapter 3.6.

MLX's streams belong to the thread that made them, so one thread loads the model and runs every
step; requests reach it through a queue, and chunks come back through the event loop of whoever
asked: nobody polls, and all chunks of a step are one call. If a step breaks in a way that the engine
itself cannot mend, everyone who waits is told, and the engine is made anew, once; if it happens again,
the thread ends.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar, Unpack

import mlx.core as mx

from tiny_llm.config_embedding import EmbedOptions, TextEmbedding
from tiny_llm.data import Chunk, Completion
from tiny_llm.engine.llm import LLM
from tiny_llm.engine.open_requests import Event
from tiny_llm.engine.prompts import Prompt, as_list
from tiny_llm.engine.turn import require_process
from tiny_llm.errors import GroupError, TinyLLMError
from tiny_llm.sampling_params import SamplingParams

REST_S = 600.0
_TEXTS_AT_ONCE = 64  # of a request's that are to become vectors
T = TypeVar("T")
Item = tuple[int, "Chunk | Exception"]  # what came of a caller's prompt of that number
Supply = Callable[[list[int], SamplingParams, Mapping[str, Any]], Awaitable[None]]
"""Takes a prompt, its params, and the options of ``Engine.add``."""
MAX_RESTARTS = 1


class EngineDeadError(TinyLLMError):
    """The engine's thread has ended: no request can be answered any more."""


class StoppedError(TinyLLMError):
    """Whoever runs the engine stops: the answer was not waited for."""


class _Mailbox:
    """What has come for one caller. Only its own event loop touches it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._items: list[Item] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        """Add to it."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Item]:
        """Everything that has come since; wait if that is nothing."""
        if not self._items:
            self._waiter = self.loop.create_future()
            await self._waiter
        items, self._items = self._items, []
        return items


@dataclass(slots=True, eq=False)
class _Asked:
    """A request on its way: the caller's prompt of that ``number``."""

    number: int
    ids: list[int]
    params: SamplingParams
    options: dict[str, Any]
    mailbox: _Mailbox
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.params.n


class AsyncLLM:
    """``LLM`` for many callers at once: ``async for chunk in llm.stream("...")``.

    Takes what LLM takes, and raises what it raises. Close it at the end, or use it in an ``async with``.
    After ``rest_s`` seconds in which nobody asked, the memory of keys and values is given back.
    ``restarts`` counts the engines that broke. ``supply``, where it is set, is awaited with each request
    before the engine gets it; ``after_step`` is called on the engine's thread.
    """

    supply: Supply | None = None
    after_step: Callable[[], None] | None = None

    def __init__(self, *args: Any, rest_s: float = REST_S, **options: Any) -> None:
        self._rest_s = rest_s
        self._process = os.getpid()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._asked: dict[int, _Asked] = {}
        self._fault: BaseException | None = None
        self._closed = threading.Event()  # no job is taken any more
        self._posting = threading.Lock()  # so that none comes between the last one and the end
        self._when_broken: Callable[[], object] = lambda: None
        self.restarts = 0
        ready: queue.SimpleQueue[LLM | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._work, args=(ready, args, options), name="engine", daemon=True
        )
        self._thread.start()
        made = ready.get()
        if isinstance(made, BaseException):
            raise made
        self.llm = made
        self.llm.when_broken(self._lose_ranks)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return not self._closed.is_set()

    @property
    def broken(self) -> GroupError | None:
        """Why other ranks of the model are lost, and the process should leave: nothing brings them back."""
        return self._fault if isinstance(self._fault, GroupError) else None

    def when_broken(self, call: Callable[[], object]) -> None:
        """``call`` once other ranks are lost, on whatever thread hears of it."""
        self._when_broken = call

    async def streams(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, **options: Any
    ) -> AsyncGenerator[list[tuple[int, Chunk]], None]:
        """Yield (number of the prompt, chunk) of all answers, whatever has come meanwhile at a time.

        ``options`` are those of ``Engine.add``. Leaving early cancels what has not ended. Raises
        RequestError, CapacityError or BusyError as ``Engine.add`` does, and EngineDeadError.
        """
        checked = [self.llm.check(prompt, params) for prompt in prompts]
        mailbox = _Mailbox()
        options["arrival_s"] = time.perf_counter()  # the engine's clock; it may be in the middle of a step
        asked = [_Asked(i, ids, own, options, mailbox) for i, (ids, own) in enumerate(checked)]
        if self.supply is not None:
            await asyncio.gather(*(self.supply(one.ids, one.params, options) for one in asked))
        left = sum(one.left for one in asked)  # before the engine's thread counts down
        self.post(lambda: self._add(asked))
        try:
            while left:
                came: list[tuple[int, Chunk]] = []
                for number, item in await mailbox.take():
                    if isinstance(item, Exception):
                        if came:
                            yield came
                        raise item
                    left -= item.completion is not None
                    came.append((number, item))
                yield came
        finally:
            if left:
                with suppress(EngineDeadError):  # then nothing is left to be cancelled
                    self.post(lambda: self._cancel(asked))

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> AsyncGenerator[Chunk, None]:
        """``streams`` of one prompt: its chunks."""
        async with aclosing(self.streams([prompt], params, **options)) as stream:
            async for came in stream:
                for _, chunk in came:
                    yield chunk

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> list[Completion]:
        """Answer one prompt whole: ``params.n`` completions."""
        ended = [c.completion async for c in self.stream(prompt, params, **options) if c.completion]
        return sorted(ended, key=lambda completion: completion.index)

    async def embed(
        self, texts: Prompt | Sequence[Prompt], **how: Unpack[EmbedOptions]
    ) -> list[TextEmbedding]:
        """``LLM.embed``, beside whatever else is under way."""
        llm = self.llm
        asked = llm.embedding.asked(as_list(texts), llm.config.hidden_size, **how)
        return [TextEmbedding.of(one) for one in await self.pooled([llm.check(*one) for one in asked])]

    async def pooled(
        self, asked: Sequence[tuple[list[int], SamplingParams]], **options: Any
    ) -> list[Completion]:
        """What came of each text; ``options`` are those of ``Engine.add``. Leaving early cancels the others.

        Some of them at a time, so that who comes later need not wait for all. Raises as ``streams`` does.
        """
        turn = asyncio.Semaphore(_TEXTS_AT_ONCE)

        async def one(ids: list[int], params: SamplingParams) -> Completion:
            async with turn:
                return (await self.generate(ids, params, **options))[0]

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(*each)) for each in asked]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def call(self, job: Callable[[LLM], T]) -> T:
        """Run ``job`` on the engine's thread between two steps: it sees nothing half done.

        Raises EngineDeadError, and what ``job`` raises.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # who asked no longer waits, and a result could not be set
            try:
                self._require_alive()
                future.set_result(job(self.llm))
            except Exception as error:
                future.set_exception(error)

        self.post(run)
        return await asyncio.wrap_future(future)

    def stop_all(self, why: str) -> None:
        """End what was asked until now: whoever awaits it gets a StoppedError that says ``why``."""
        with suppress(EngineDeadError):  # then they have been told already
            self.post(lambda: self._stop_all(why))

    def close(self) -> None:
        """End the thread after its step; who still waits is told. The memory of weights, keys and values is
        given back. May be repeated."""
        self._inbox.put(None)
        self._thread.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)  # a step may take its time, and others share this loop

    def __repr__(self) -> str:
        return f"<AsyncLLM {self.llm.description}>"

    def _require_alive(self) -> None:
        require_process(self._process)
        if not self.alive:
            raise EngineDeadError(f"The engine has stopped: {self._fault or 'it was closed'}.")

    def post(self, job: Callable[[], None]) -> None:
        """Have ``job`` done on the engine's thread between two steps. Raises EngineDeadError."""
        with self._posting:
            self._require_alive()
            self._inbox.put(job)

    def _work(
        self, ready: queue.SimpleQueue[LLM | BaseException], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        try:
            self.llm = LLM(*args, **options)
            if mx.default_device().type == mx.gpu:
                self.llm.engine.runner.warm_up(self.llm.engine.settings.kv_blocks)
        except BaseException as error:
            self._closed.set()
            ready.put(error)
            return
        self._heed_others()
        ready.put(self.llm)
        try:
            while self._take_jobs():
                self._step()
        except BaseException as error:  # no request causes this: it is a bug, and everyone must hear of it
            self._fault = error
        with self._posting:
            self._closed.set()
        while not self._inbox.empty():  # they came too late, and say so to whoever asked
            if job := self._inbox.get():
                job()
        self._tell_all(f"The engine has stopped: {self._fault or 'it was closed'}.")
        if self.broken is not None:
            self._when_broken()
        self.llm.close()

    def _step(self) -> None:
        try:
            self._deliver(self.llm.engine.step())
            if self.after_step is not None:
                self.after_step()
        except Exception as error:
            if self.restarts >= MAX_RESTARTS or isinstance(error, GroupError):
                raise
            self.restarts += 1
            self._tell_all(f"The engine broke and was made anew: {type(error).__name__}: {error}")
            self.llm.engine.close()
            self.llm = self.llm.with_engine(self.llm.engine.settings)
            self._heed_others()

    def _heed_others(self) -> None:
        """Models that share memory with this one ask for it while it is idle, too."""
        if (share := self.llm.engine.settings.share) is not None:
            share.wake = lambda: self._inbox.put(lambda: self.llm.engine.give_back())

    def _lose_ranks(self, why: str) -> None:
        """Other ranks are lost. The engine may wait for them for ever, so all are told from here."""
        self._fault = GroupError(why)
        with self._posting:
            self._closed.set()
        _hand_over((asked, EngineDeadError(why)) for asked in list(self._asked.values()))
        self._inbox.put(None)
        self._when_broken()

    def _stop_all(self, why: str) -> None:
        """Only tell: each stream cancels its own request when it ends."""
        _hand_over((asked, StoppedError(why)) for asked in self._asked.values())

    def _tell_all(self, what: str) -> None:
        _hand_over((asked, EngineDeadError(what)) for asked in self._asked.values())
        self._asked.clear()

    def _take_jobs(self) -> bool:
        """Do what was asked since the last step; with nothing to do, wait for it. False: it is the end."""
        end: float | None = time.monotonic() + self._rest_s  # whoever only looks does not put it off
        while True:
            idle = not len(self.llm.engine)
            patience = None if end is None else max(0.0, end - time.monotonic())
            try:
                job = self._inbox.get(block=idle, timeout=patience)
            except queue.Empty:
                if not idle:
                    return True
                self.llm.engine.rest()
                end = None  # until somebody asks
                continue
            if job is None:
                return False
            job()

    def _add(self, all_asked: Sequence[_Asked]) -> None:
        for asked in all_asked:
            try:
                self._require_alive()
                self._asked[self.llm.engine.add(asked.ids, asked.params, **asked.options)] = asked
            except Exception as error:
                _hand_over([(asked, error)])
                return

    def _cancel(self, all_asked: Sequence[_Asked]) -> None:
        for number in [number for number, asked in self._asked.items() if asked in all_asked]:
            self.llm.engine.cancel(number)
            del self._asked[number]

    def _deliver(self, events: Iterable[Event]) -> None:
        known = []
        for number, chunk in events:
            asked = self._asked.get(number)
            if asked is None:
                continue
            asked.left -= chunk.completion is not None
            if not asked.left:
                del self._asked[number]
            known.append((asked, chunk))
        _hand_over(known)


def _hand_over(items: Iterable[tuple[_Asked, Chunk | Exception]]) -> None:
    """Put each item into its mailbox, from any thread, with one call of an event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, Item]]] = {}
    for asked, item in items:
        loops.setdefault(asked.mailbox.loop, []).append((asked.mailbox, (asked.number, item)))
    for loop, mail in loops.items():
        with suppress(RuntimeError):  # it is closed, and nobody waits there
            loop.call_soon_threadsafe(_sort, mail)


def _sort(mail: list[tuple[_Mailbox, Item]]) -> None:
    for mailbox, item in mail:
        mailbox.put(item)
