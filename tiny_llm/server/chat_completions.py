"""Owns POST /v1/chat/completions: a conversation's next message."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial

from fastapi import Request
from fastapi.responses import Response

from tiny_llm.data import Chunk, Completion
from tiny_llm.decoding.chat_format import ChatFormat
from tiny_llm.decoding.message import message_of
from tiny_llm.engine.llm import LLM
from tiny_llm.server.answers import (
    DONE,
    EventStream,
    chat_logprobs,
    delta_json,
    dumps,
    event_of,
    events_around,
    message_json,
    new_id,
    usage,
)
from tiny_llm.server.bodies import ChatBody, NamedTool
from tiny_llm.server.params import chat_ids, grammar_of, job_of, params_of, require_model
from tiny_llm.server.problems import Problem
from tiny_llm.server.service import Job, Pieces, Service, aside


async def chat(service: Service, request: Request, body: ChatBody) -> Response:
    """Answer one request, at once or as a stream."""
    form, job = await chat_job(service, request, body)
    answer = _Answer(service, body, form)
    if body.stream:
        return EventStream(answer.events(await service.begin(request, job)))
    return Response(dumps(answer.whole(await service.whole(request, job))), media_type="application/json")


async def chat_job(service: Service, request: Request, body: ChatBody) -> tuple[ChatFormat, Job]:
    """How a chat's answers are read, and what it asks of the engine.

    Raises Problem or RequestError for what cannot be asked.
    """
    require_model(body.model, service.settings.name)
    form, job = await aside(request, lambda: _form_and_job(service.llm, body, request.state.salt))
    return form, await service.constrained(job, form.grammar)


def _form_and_job(llm: LLM, body: ChatBody, key_salt: str) -> tuple[ChatFormat, Job]:
    if body.top_logprobs is not None and not body.logprobs:
        what = "top_logprobs needs logprobs to be true."
        raise Problem(400, what, code="invalid_value", param="top_logprobs")
    choice = body.tool_choice
    form = ChatFormat.of(
        llm.tokenizer,
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools],
        tool_choice=choice.model_dump() if isinstance(choice, NamedTool) else choice,
        parallel_tool_calls=body.parallel_tool_calls,
        grammar=grammar_of(body),
    )
    prompts = [chat_ids(llm, body.messages, body.chat_template_kwargs, form.tools)]
    most = body.max_completion_tokens or body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = params_of(llm, body, prompts, max_tokens=most, logprobs=logprobs)
    return form, job_of(body, prompts, form.params(params), key_salt)


class _Answer:
    """One request's response in the making."""

    def __init__(self, service: Service, body: ChatBody, form: ChatFormat) -> None:
        self._tokenizer = service.llm.tokenizer
        self._body = body
        self._id = new_id("chatcmpl")
        self._created = int(time.time())
        self._model = service.settings.name
        self._parsers = [form.parser() for _ in range(body.n)]

    def whole(self, answers: Sequence[Sequence[Chunk]]) -> dict[str, object]:
        """The response of a request that is not streamed."""
        ended = [chunk.completion for chunks in answers for chunk in chunks if chunk.completion]
        choices = [self._message(index, chunks) for index, chunks in enumerate(answers)]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(ended)}

    def _message(self, index: int, chunks: Sequence[Chunk]) -> dict[str, object]:
        parser = self._parsers[index]
        deltas = parser.push("".join(chunk.text for chunk in chunks)) + parser.finish()
        rows = [row for chunk in chunks for row in chunk.logprobs or ()]
        rest = self._rest(rows, chunks[-1].completion, parser.calls)
        return {"index": index, "message": message_json(message_of(deltas)), **rest}

    async def events(self, pieces: Pieces) -> AsyncGenerator[bytes, None]:
        """The response of a request that is: who speaks, then what it says, then why it ended."""
        options, ended = self._body.stream_options, list[Completion]()
        head = self._head("chat.completion.chunk")
        with_usage = {"usage": None} if options is not None and options.include_usage else {}

        def event(index: int, delta: dict[str, object], rest: dict[str, object]) -> dict[str, object]:
            return {**head, "choices": [{"index": index, "delta": delta, **rest}], **with_usage}

        def saying(index: int, text: str) -> dict[str, object]:
            return event(index, {"content": text}, self._rest([], None, 0))

        quick: dict[int, Callable[[str], bytes]] = {}  # for an answer that has begun: only its text changes
        async with aclosing(pieces):
            async for came in pieces:
                events = []
                for index, chunk in came:
                    deltas = self._deltas(index, chunk)
                    if index not in quick:
                        deltas.insert(0, {"role": "assistant", "content": ""})
                        quick[index] = events_around(partial(saying, index))
                    elif len(deltas) == 1 and deltas[0].keys() == {"content"} and _says_no_more(chunk):
                        events.append(quick[index](str(deltas[0]["content"])))
                        continue
                    if chunk.completion is not None:
                        ended.append(chunk.completion)
                    for delta in deltas:
                        rest = self._rest([], None, 0)
                        if delta is deltas[-1]:
                            calls = self._parsers[index].calls
                            rest = self._rest(chunk.logprobs or [], chunk.completion, calls)
                        events.append(event_of(event(index, delta, rest)))
                if events:
                    yield b"".join(events)
        tail = event_of({**head, "choices": [], "usage": usage(ended)}) if with_usage else b""
        yield tail + DONE

    def _deltas(self, index: int, chunk: Chunk) -> list[dict[str, object]]:
        """What a chunk adds to the message; one empty delta where only its end or a logprob is to be told."""
        parser = self._parsers[index]
        found = parser.push(chunk.text) + (parser.finish() if chunk.completion else [])
        deltas = [delta_json(delta) for delta in found]
        return deltas or ([{}] if chunk.completion or chunk.logprobs else [])

    def _rest(
        self, rows: Sequence[dict[int, float]], ended: Completion | None, calls: int
    ) -> dict[str, object]:
        told = None
        if self._body.logprobs:
            told = {
                "content": chat_logprobs(self._tokenizer, rows, self._body.top_logprobs or 0),
                "refusal": None,
            }
        reason: str | None = None if ended is None else ended.finish_reason
        return {"logprobs": told, "finish_reason": "tool_calls" if reason == "stop" and calls else reason}

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}


def _says_no_more(chunk: Chunk) -> bool:
    """Whether a chunk is its text alone."""
    return chunk.completion is None and not chunk.logprobs
