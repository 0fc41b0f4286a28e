"""Owns the engine's thread, and the way from asyncio to it and back. Chapter 3.5.

MLX's streams belong to the thread that made them, so one thread loads the model and runs every
step; requests reach it through a queue, and chunks come back through the event loop of whoever
asked: nobody polls. If the thread dies, everyone who waits is told.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from tiny_llm.data import Chunk, Completion, SamplingParams
from tiny_llm.engine.llm import LLM, Prompt
from tiny_llm.errors import TinyLLMError

REST_S = 600.0


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
    memory of keys and values is given back.
    """

    def __init__(self, *args: Any, rest_s: float = REST_S, **options: Any) -> None:
        self._rest_s = rest_s
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._asked: dict[int, _Asked] = {}
        self._fault: BaseException | None = None
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
        return self._thread.is_alive() and self._fault is None

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

    def close(self) -> None:
        """End the thread after its step; who still waits is told."""
        self._inbox.put(None)
        self._thread.join()

    def _post(self, job: Callable[[], None]) -> None:
        if not self.alive:
            raise EngineDeadError(f"The engine has stopped: {self._fault or 'it was closed'}.")
        self._inbox.put(job)

    def _work(
        self, ready: queue.SimpleQueue[LLM | BaseException], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        try:
            self.llm = LLM(*args, **options)
        except BaseException as error:
            ready.put(error)
            return
        ready.put(self.llm)
        try:
            while self._take_jobs():
                for number, chunk in self.llm.engine.step():
                    self._deliver(number, chunk)
        except BaseException as error:  # no request causes this: it is a bug, and everyone must hear of it
            self._fault = error
        for asked in self._asked.values():
            asked.deliver(EngineDeadError(f"The engine has stopped: {self._fault or 'it was closed'}."))

    def _take_jobs(self) -> bool:
        """Do what was asked since the last step; with nothing to do, wait for it. False: it is the end."""
        patience: float | None = self._rest_s
        while True:
            idle = not len(self.llm.engine)
            try:
                job = self._inbox.get(block=idle, timeout=patience)
            except queue.Empty:
                if not idle:
                    return True
                self.llm.engine.rest()
                patience = None  # until somebody asks
                continue
            if job is None:
                return False
            job()

    def _add(self, asked: _Asked) -> None:
        try:
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
