"""Owns the engine as the routes see it: its state, and jobs that it does for requests.

Loading, ready, draining, dead: said in one place. A stream begins before its response does, so that a
refusal still has its status; and it ends with its reader, whatever ends that one. Knows no HTTP body.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

from fastapi import Request

from tiny_llm.data import Chunk, Completion
from tiny_llm.decoding.grammar import Grammar
from tiny_llm.decoding.structured_output import GrammarCompiler
from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import did_you_mean
from tiny_llm.memory import give_back_memory
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.server.jobs import ChunkStream, Job, chunks_of, failure_of
from tiny_llm.server.problems import Problem
from tiny_llm.server.settings import ServerSettings

T = TypeVar("T")
SMALL_BODY_BYTES = 2**13
"""Templates and tokenizers take less for it than a thread's wake-up on a busy machine."""
_THREADS = 2
"""For what takes long. Each one that computes delays the event loop's and the engine's turn a little."""
_STOPPED = "The server is shutting down, and its time to drain is over."
_SAID: Mapping[str, str] = {
    "unloaded": "The model is not loaded; a request to it loads it.",
    "loading": "The model is being loaded.",
    "draining": "The server is shutting down.",
    "dead": "The engine has stopped; the server must be started again.",
}
State = Literal["unloaded", "loading", "ready", "draining", "dead"]


class Service:
    """One model, served. ``load`` makes the engine, and may take long; ``start`` calls it in a thread.

    What is one of several, of ``weight_bytes``, may ``rest`` until it is asked for.

    ``prompt_tokens`` counts those of all requests that began.
    """

    def __init__(self, settings: ServerSettings, load: Callable[[], AsyncLLM], weight_bytes: int = 0) -> None:
        self.weight_bytes = weight_bytes
        self.rests = False
        self.settings = settings
        self.created = int(time.time())
        self.draining = False
        self._is_stopped = False
        self.prompt_tokens = 0
        self._grammars = GrammarThreads(settings.compile_timeout_s)
        self.load = load
        self._engine: AsyncLLM | None = None

    @property
    def state(self) -> State:
        """What can be expected of us."""
        if self._engine is None:
            return "unloaded" if self.rests else "loading"
        if not self._engine.alive:
            return "dead"
        return "draining" if self.draining else "ready"

    @property
    def engine(self) -> AsyncLLM:
        """The engine's front. Raises Problem while it loads."""
        if self._engine is None:
            raise Problem(503, _SAID[self.state], code=self.state)
        return self._engine

    @property
    def broken(self) -> Exception | None:
        """Why the process should leave; see ``AsyncLLM.broken``."""
        return None if self._engine is None else self._engine.broken

    @property
    def llm(self) -> LLM:
        """Model, tokenizer and limits."""
        return self.engine.llm

    def is_called(self, name: str) -> bool:
        """Whether that is a name of the model."""
        return name == self.settings.name or any(fnmatchcase(name, one) for one in self.settings.aliases)

    def require_model(self, asked: str | None) -> None:
        """Raise Problem if another model than ours is asked for."""
        name = self.settings.name
        if asked is not None and not self.is_called(asked):
            asked = asked[:200]
            what = f"The model {asked!r} is not served here; {name!r} is.{did_you_mean(asked, [name])}"
            raise Problem(404, what, code="model_not_found", param="model")

    def problem(self) -> Problem | None:
        """Why no request can be served now."""
        state = self.state
        return None if state == "ready" else Problem(503, _SAID[state], code=state)

    async def start(self) -> None:
        """Load the model, and make ready for forms, which holds up everybody. Raises what loading raises."""
        if not self.rests:  # one of several that comes later finds it done
            threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="aside")
            asyncio.get_running_loop().set_default_executor(threads)
        engine = await asyncio.to_thread(self.load)
        await asyncio.to_thread(engine.llm.grammars.prepare)
        self._engine, self.rests = engine, False

    async def rest(self) -> None:
        """Let go of the model, until ``start``. There must be no request."""
        engine, self._engine, self.rests = self._engine, None, True
        if engine is not None:
            await asyncio.to_thread(engine.close)
            del engine
            await asyncio.to_thread(_collect)

    async def close(self) -> None:
        """End the engine's thread after its step."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)

    def stop(self) -> None:
        """The time to drain is over: who still waits for an answer is told, in their interface's words."""
        self._is_stopped = True
        if self._engine is not None:
            self._engine.stop_all(_STOPPED)

    async def begin(self, request: Request, job: Job) -> ChunkStream:
        """Start a job and return its chunks once the first ones are there. Closing the stream cancels it.

        Raises what the engine refuses it with, RequestError for a grammar that cannot be kept to, and Problem
        for a job that waited too long.
        """
        if job.grammar is not None:
            params = await self._grammars.constrain(self.llm.grammars, job.params, job.grammar)
            job = job._replace(params=params)
        self._require_time()
        chunks = chunks_of(self.engine, job)
        try:
            first = await unless_gone(request, anext(chunks))
        except BaseException:
            await chunks.aclose()
            raise
        self.prompt_tokens += sum(map(len, job.prompts))
        return with_first(first, chunks)

    async def whole(self, request: Request, job: Job) -> list[list[Chunk]]:
        """All chunks of each answer of a job. If the client goes, so does the job."""
        answers: list[list[Chunk]] = [[] for _ in range(len(job.prompts) * job.params.n)]
        async with aclosing(await self.begin(request, job)) as chunks:

            async def collect() -> None:
                async for came in chunks:
                    for index, chunk in came:
                        answers[index].append(chunk)

            await unless_gone(request, collect())
        return answers

    async def pooled(
        self, request: Request, asked: Sequence[tuple[list[int], SamplingParams]], **options: Any
    ) -> list[Completion]:
        """What came of each text that is to become a vector. If the client goes, so do they.

        Raises as ``AsyncLLM.pooled`` does, and Problem for one that ended otherwise.
        """
        self._require_time()
        ended = await unless_gone(request, self.engine.pooled(asked, **options))
        for completion in ended:
            if problem := failure_of(completion, begun=False):
                raise problem
        self.prompt_tokens += sum(len(completion.prompt_token_ids) for completion in ended)
        return ended

    def _require_time(self) -> None:
        if self._is_stopped:
            raise Problem(503, _STOPPED, code="draining")


def _collect() -> None:
    """What the engine held goes, also what ``gc.freeze`` took out of sight."""
    gc.unfreeze()
    gc.collect()
    give_back_memory()


async def aside(request: Request, work: Callable[[], T]) -> T:
    """Do what takes as long as the body is large: in a thread, or here, where it is soon done."""
    return work() if is_small(request) else await asyncio.to_thread(work)


def is_small(request: Request) -> bool:
    """Whether whatever a request's body makes is small too."""
    return bool(request.state.body_bytes <= SMALL_BODY_BYTES)


class ClientGone(Exception):
    """Nobody is there to be answered."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await ``work``, or cancel it when the client goes away. Raises ClientGone then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def with_first(first: T, rest: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """``first``, then the ``rest`` that it was taken from: so that a refusal still has its status."""
    async with aclosing(rest):
        yield first
        async for item in rest:
            yield item


class GrammarThreads:
    """Where what an answer must match is compiled, beside the event loop, within ``timeout_s``."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")

    async def constrain(
        self, compiler: GrammarCompiler, params: SamplingParams, grammar: Grammar
    ) -> SamplingParams:
        """As ``compiler.constrain``. Raises Problem where that takes too long, RequestError as it does."""
        if compiler.is_kept(grammar):
            return compiler.constrain(params, grammar)
        loop = asyncio.get_running_loop()
        compiling = loop.run_in_executor(self._threads, compiler.constrain, params, grammar)
        try:
            return await asyncio.wait_for(compiling, self._timeout_s)
        except TimeoutError:
            what = f"{grammar.param} took more than {self._timeout_s:g} s to compile; make it simpler."
            raise Problem(400, what, code="too_complex", param=grammar.param) from None
