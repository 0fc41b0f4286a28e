"""Owns how an answer leaves: whole, or as server-sent events while it grows. One loop for all interfaces.

What an interface says of an answer is its ``ResponseWriter``'s; that a stream ends with its reader, that a
fault still becomes an event, that all who came at a time leave together, is said here.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from json.encoder import encode_basestring as _quoted
from typing import Any, ClassVar, TypeAlias, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Send

from tiny_llm.data import Chunk, Completion
from tiny_llm.errors import CapacityError
from tiny_llm.server.answers import dumped, dumps, one_line
from tiny_llm.server.bodies import Choosing
from tiny_llm.server.jobs import ChunkStream, Job
from tiny_llm.server.problems import problem_of
from tiny_llm.server.service import Service, aside, is_small

DONE = b"data: [DONE]\n\n"
SLICE_S = 0.002  # how long the writing of one stream's events may keep the event loop
_FEW_LOGPROBS = 64  # written in a moment, each with those of 20 other tokens
_FEW_TOKENS = 4096  # whose text is looked through in a moment
_PIECES_AT_A_TIME = 16
_HOLE = "\x00"  # no other value of ours ends with it


def event_of(value: object) -> bytes:
    """A value as an event."""
    return b"data: " + b"".join(dumped(value)) + b"\n\n"


def events_around(make: Callable[[str], object]) -> Callable[[str], bytes]:
    """``event_of(make(text))`` for text after text, quickly: all that stands around it is written once."""
    before, _, after = event_of(make(_HOLE)).rpartition(dumps(_HOLE))
    return lambda text: before + one_line(_quoted(text)).encode() + after


def failure_event(error: Exception) -> bytes:
    """A fault as a stream's last event: the status has been sent already."""
    return event_of(problem_of(error).body) + DONE


class ResponseWriter(ABC):
    """One request's response in the making, in one interface's words.

    ``asked_by`` is the field that its prompts come in, ``end`` what ends a stream of its.
    """

    asked_by: ClassVar[str] = "messages"
    end: ClassVar[bytes] = DONE

    @abstractmethod
    def whole(self, answers: Sequence[Sequence[Chunk]], ended: Sequence[Completion]) -> object:
        """The response of a request that is not streamed: all chunks of each answer, and its completion."""

    def opening(self) -> bytes:
        """The events before the first chunk."""
        return b""

    @abstractmethod
    def events(self, index: int, chunk: Chunk) -> bytes:
        """What a chunk of answer ``index`` is told by; b"" if it has nothing new."""

    def closing(self, ended: Sequence[Completion]) -> bytes:
        """The events after the last chunk."""
        return b""

    def failure(self, error: Exception) -> bytes:
        """The event of a fault."""
        return event_of(problem_of(error).body)

    def failed(self, error: Exception) -> bytes:
        """That, and the end of the stream."""
        return self.failure(error) + self.end


AnyBody = TypeVar("AnyBody", bound=Choosing)
Asking: TypeAlias = Callable[[Service, AnyBody, str], tuple[Job, ResponseWriter]]
"""(service, a body, its key's salt) -> what it asks of the engine, and who writes the response to it.

Raises Problem or RequestError for what cannot be asked.
"""


async def answered(service: Service, request: Request, body: AnyBody, asking: Asking[AnyBody]) -> Response:
    """Answer a request, at once or as a stream. Raises what it is refused with."""
    service.require_model(body.model)
    job, writer = await aside(request, lambda: asking(service, body, request.state.salt))
    try:
        if body.stream:
            chunks = await service.begin(request, job)
            return EventStream(_written(request, writer, chunks), writer.failed)
        answers = await service.whole(request, job)
    except CapacityError as error:
        raise problem_of(error, asked_by=writer.asked_by) from error
    ended = [chunks[-1].completion for chunks in answers if chunks[-1].completion is not None]
    assert len(ended) == len(answers), "the last chunk of an answer has its completion"
    tokens = sum(len(completion.token_ids) for completion in ended)
    rows = tokens if job.params.logprobs is not None else 0
    if job.params.prompt_logprobs is not None:
        rows += sum(len(completion.prompt_token_ids) for completion in ended)
    if is_small(request) and rows < _FEW_LOGPROBS and tokens < _FEW_TOKENS:
        return Response(b"".join(dumped(writer.whole(answers, ended))), media_type="application/json")
    rows_of_each = [completion.logprobs or [] for completion in ended]
    return await large_json(lambda: writer.whole(answers, ended), *answers, *rows_of_each)


async def large_json(make: Callable[[], object], *used_up: list[Any]) -> Response:
    """A response that takes a while to make and to write: others' turn comes in between.

    The lists of what it was made of, ``used_up``, are emptied.
    """

    def made() -> list[bytes]:
        pieces = list(dumped(make()))
        _empty(used_up)
        return pieces

    pieces = await asyncio.to_thread(made)

    async def sent() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(pieces), _PIECES_AT_A_TIME):
            yield b"".join(pieces[start : start + _PIECES_AT_A_TIME])
            await asyncio.sleep(0)

    length = str(sum(map(len, pieces)))
    return StreamingResponse(sent(), media_type="application/json", headers={"Content-Length": length})


def _empty(lists: Iterable[list[Any]]) -> None:
    """Let go of items one by one: while half a million numbers are freed at once, nothing else runs."""
    for items in lists:
        while items:
            items.pop()


async def _written(
    request: Request, writer: ResponseWriter, chunks: ChunkStream
) -> AsyncGenerator[bytes, None]:
    """The events of a stream; those of chunks that came together are one piece."""
    ended: list[Completion] = []
    async with aclosing(chunks):
        opening = await aside(request, writer.opening)
        if opening:
            yield opening
        async for came in chunks:
            ended += [chunk.completion for _, chunk in came if chunk.completion is not None]
            async for piece in _in_slices(writer, came):
                yield piece
    if sum(len(completion.logprobs or ()) for completion in ended) < _FEW_LOGPROBS:
        yield await aside(request, lambda: writer.closing(ended)) + writer.end
    else:
        closing = await asyncio.to_thread(writer.closing, ended)
        await asyncio.to_thread(_empty, [completion.logprobs or [] for completion in ended])
        yield closing + writer.end


async def _in_slices(
    writer: ResponseWriter, came: Sequence[tuple[int, Chunk]]
) -> AsyncGenerator[bytes, None]:
    """The events of chunks, others' turn coming in between: a slow reader's backlog may be long."""
    pieces: list[bytes] = []
    began = time.perf_counter()
    for index, chunk in came:
        logprobs = (chunk.logprobs, chunk.prompt_logprobs, chunk.completion and chunk.completion.logprobs)
        if sum(len(rows or ()) for rows in logprobs) < _FEW_LOGPROBS:
            pieces.append(writer.events(index, chunk))
        else:
            pieces.append(await asyncio.to_thread(writer.events, index, chunk))
        if time.perf_counter() - began > SLICE_S:
            yield b"".join(pieces)
            await asyncio.sleep(0)
            pieces, began = [], time.perf_counter()
    rest = b"".join(pieces)
    if rest:
        yield rest


class EventStream(StreamingResponse):
    """Server-sent events from a generator, which is closed at once when the client goes away."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], failure: Callable[[Exception], bytes] = failure_event
    ) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events
        self._failure = failure

    async def stream_response(self, send: Send) -> None:
        """Send all events; whatever stops it, the generator does not go on. A fault becomes an event."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        more = True
        async with aclosing(self._events) as events:
            while more:
                try:
                    body = await anext(events)
                except StopAsyncIteration:
                    body, more = b"", False
                except Exception as error:
                    body, more = self._failure(error), False
                await send({"type": "http.response.body", "body": body, "more_body": more})
