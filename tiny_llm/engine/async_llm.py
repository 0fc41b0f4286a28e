"""Owns the engine's thread, and the way from asyncio to it and back. Chapter 3.5.

MLX's streams belong to the thread that made them, so one thread loads the model and runs every
step; requests reach it through a queue, and chunks come back through the event loop of whoever
asked: nobody polls. If a step breaks in a way that the engine itself cannot mend, everyone who waits is
told, and the engine is made anew, once; if it happens again, the thread ends.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tiny_llm.data import Chunk, Completion, SamplingParams
from tiny_llm.engine.llm import LLM, Prompt
from tiny_llm.errors import TinyLLMError

REST_S = 600.0
T = TypeVar("T")
MAX_RESTARTS = 1


class EngineDeadError(TinyLLMError):
    """The engine's thread has ended: no request can be answered any more."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A request on its way: ``deliver`` may be called from any thread."""

    ids: list[int]
    params: SamplingParams
    options: dict[str, Any]
    deliver: Callable[[Chunk | Exception], None]
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.params.n


class AsyncLLM:
    """``LLM`` for many callers at once: ``async for chunk in llm.stream("...")``. Close it at the end.

    Takes what LLM takes, and raises what it raises. After ``rest_s`` seconds in which nobody asked, the
    memory of keys and values is given back. ``restarts`` counts the engines that broke.
    """

    def __init__(self, *args: Any, rest_s: float = REST_S, **options: Any) -> None:
        self._rest_s = rest_s
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._asked: dict[int, _Asked] = {}
        self._fault: BaseException | None = None
        self._closed = threading.Event()  # no job is taken any more
        self._posting = threading.Lock()  # so that none comes between the last one and the end
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

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return not self._closed.is_set()

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[Chunk]:
        """Yield the answer's chunks; ``options`` are those of ``Engine.add``. Leaving early cancels it.

        Raises RequestError, CapacityError or BusyError as ``Engine.add`` does, and EngineDeadError.
        """
        ids, checked = self.llm.check(prompt, params)
        loop, chunks = asyncio.get_running_loop(), asyncio.Queue[Chunk | Exception]()

        def deliver(item: Chunk | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(chunks.put_nowait, item)

        asked = _Asked(ids, checked, options, deliver)
        self._post(lambda: self._add(asked))
        left = checked.n
        try:
            while left:
                item = await chunks.get()
                if isinstance(item, Exception):
                    left = 0
                    raise item
                left -= item.completion is not None
                yield item
        finally:
            if left:
                self._post(lambda: self._cancel(asked))

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> list[Completion]:
        """Answer one prompt whole: ``params.n`` completions."""
        ended = [c.completion async for c in self.stream(prompt, params, **options) if c.completion]
        return sorted(ended, key=lambda completion: completion.index)

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

        self._post(run)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the thread after its step; who still waits is told."""
        self._inbox.put(None)
        self._thread.join()

    def _require_alive(self) -> None:
        if not self.alive:
            raise EngineDeadError(f"The engine has stopped: {self._fault or 'it was closed'}.")

    def _post(self, job: Callable[[], None]) -> None:
        with self._posting:
            self._require_alive()
            self._inbox.put(job)

    def _work(
        self, ready: queue.SimpleQueue[LLM | BaseException], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        try:
            self.llm = LLM(*args, **options)
        except BaseException as error:
            self._closed.set()
            ready.put(error)
            return
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

    def _step(self) -> None:
        try:
            for number, chunk in self.llm.engine.step():
                self._deliver(number, chunk)
        except Exception as error:
            if self.restarts >= MAX_RESTARTS:
                raise
            self.restarts += 1
            self._tell_all(f"The engine broke and was made anew: {type(error).__name__}: {error}")
            self.llm = self.llm.with_engine(self.llm.engine.settings)

    def _tell_all(self, what: str) -> None:
        for asked in set(self._asked.values()):
            asked.deliver(EngineDeadError(what))
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

    def _add(self, asked: _Asked) -> None:
        try:
            self._require_alive()
            self._asked[self.llm.engine.add(asked.ids, asked.params, **asked.options)] = asked
        except Exception as error:
            asked.deliver(error)

    def _cancel(self, asked: _Asked) -> None:
        for number in [number for number, other in self._asked.items() if other is asked]:
            self.llm.engine.cancel(number)
            del self._asked[number]

    def _deliver(self, number: int, chunk: Chunk) -> None:
        asked = self._asked.get(number)
        if asked is None:
            return
        asked.left -= chunk.completion is not None
        if not asked.left:
            del self._asked[number]
        asked.deliver(chunk)
