"""Owns who may use an engine now: one thread at a time, in the process that made it.

MLX's streams belong to a thread, and what one step prepares for the next is lazy; a forked process has no
threads at all that could compute. Knows no model and no request but by its number.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from tiny_llm.engine.engine import Engine
from tiny_llm.errors import UsageError


class Turn:
    """The turn to use ``engine``: a thread that has begun a request keeps it until nothing is under way."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._process = os.getpid()
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._left: deque[int] = deque()  # requests that nobody waits for any more

    @contextmanager
    def taken(self) -> Iterator[Engine]:
        """The engine, meanwhile the caller's alone. Raises UsageError where it cannot be."""
        require_process(self._process)
        me = threading.get_ident()
        with self._lock:
            self._cancel_left()
            if len(self.engine) and self._thread != me:
                raise UsageError(
                    "Requests of another thread are under way on this LLM, and only that thread can go on "
                    "with them. For requests of several threads make an AsyncLLM: it answers them together."
                )
            self._thread = me
            yield self.engine

    def leave(self, request_id: int) -> None:
        """End a request now, or before the next step if one is under way.

        For any thread, at any time: the garbage collector calls it when it finds a stream that nobody reads.
        """
        self._left.append(request_id)
        if os.getpid() == self._process and self._lock.acquire(blocking=False):
            try:
                self._cancel_left()
            finally:
                self._lock.release()

    def _cancel_left(self) -> None:
        while self._left:
            self.engine.cancel(self._left.popleft())


def require_process(process: int) -> None:
    """Raise UsageError if this is not ``process``, but a fork of it."""
    if os.getpid() != process:
        raise UsageError(
            f"This process was forked from process {process}, where an LLM had been made; the threads that "
            'compute were not copied. Start processes by multiprocessing.get_context("spawn"), and make the '
            "LLM in each."
        )


def require_unforked() -> None:
    """Raise UsageError if a process that this one was forked from has called this, which sets MLX to work."""
    require_process(_first_process())


@cache
def _first_process() -> int:
    """The process that asked first; its forks inherit the answer."""
    return os.getpid()
