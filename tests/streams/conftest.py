"""An engine that a test steps by hand: what crosses from its thread to asyncio and back, thing by thing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from tiny_llm.data import Chunk, Completion, EndReason, Timing
from tiny_llm.engine.async_llm import AsyncLLM, EngineDeadError
from tiny_llm.engine.open_requests import Event
from tiny_llm.errors import RequestError
from tiny_llm.sampling_params import SamplingParams

T = TypeVar("T")
PATIENCE_S = 10.0


class ByHand(AsyncLLM):
    """Nothing happens on the engine's side until ``work``: then what was posted is done, in order."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []
        self.added: list[tuple[list[int], dict[str, Any]]] = []
        self.cancelled: list[int] = []
        self.is_dead = False
        self._asked = {}
        self._process = 0
        engine = SimpleNamespace(add=self._added, cancel=self.cancelled.append)
        self.llm = SimpleNamespace(check=self._checked, engine=engine)  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "<an engine by hand>"

    def _checked(self, prompt: Any, params: SamplingParams | None) -> tuple[list[int], SamplingParams]:
        if not prompt:
            raise RequestError("The prompt is empty.")
        return list(prompt), params or SamplingParams()

    def _added(self, ids: list[int], params: SamplingParams, **options: Any) -> int:
        if ids == [404]:
            raise RequestError("The engine refuses it.")
        self.added.append((ids, options))
        return len(self.added)

    def _require_alive(self) -> None:
        if self.is_dead:
            raise EngineDeadError("The engine has stopped.")

    def post(self, job: Callable[[], None]) -> None:
        """Keep it for ``work``."""
        self._require_alive()
        self.jobs.append(job)

    def work(self, *events: tuple[int, Chunk]) -> None:
        """What the engine's thread does in a turn: the jobs, then a step with these events."""
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            job()
        self._deliver([Event(*event) for event in events])

    @property
    def open(self) -> int:
        """How many requests somebody waits for, as the engine's side sees it."""
        return len(self._asked)


def piece(text: str, index: int = 0) -> Chunk:
    """In the midst of answer ``index``."""
    return Chunk(text, (7,), None, index)


def last(text: str, index: int = 0, reason: EndReason = "stop", error: str | None = None) -> Chunk:
    """The end of answer ``index``."""
    whole = Completion(text, [7], reason, [1], None, Timing(1, 1, 0, 0, 0), index=index, error=error)
    return Chunk(text, (7,), whole, index)


async def settle() -> None:
    """Let all that can run run, and what that wakes."""
    for _ in range(12):
        await asyncio.sleep(0)


def run(work: Coroutine[Any, Any, T]) -> T:
    """In an event loop of its own, and not for ever."""
    return asyncio.run(asyncio.wait_for(work, PATIENCE_S))


@pytest.fixture
def by_hand() -> SimpleNamespace:
    """``engine``, ``piece(text)``, ``last(text)``, ``await settle()``, ``run(coroutine)``."""
    return SimpleNamespace(engine=ByHand(), piece=piece, last=last, settle=settle, run=run)
