"""Owns POST /v1/chat/completions: a conversation's next message."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from fastapi import Request
from fastapi.responses import Response

from tiny_llm.data import Chunk, Completion
from tiny_llm.server.answers import (
    DONE,
    EventStream,
    chat_logprobs,
    dumps,
    event_of,
    events_around,
    new_id,
    usage,
)
from tiny_llm.server.bodies import ChatBody, NamedTool
from tiny_llm.server.grammars import lark_form
from tiny_llm.server.params import chat_ids, form_of, job_of, params_of, require_model, require_no_late_end
from tiny_llm.server.problems import Problem
from tiny_llm.server.service import Job, Pieces, Service, aside
from tiny_llm.server.tools import CLOSE, OPEN, Reader, calls_grammar, message_of, style_of


async def chat(service: Service, request: Request, body: ChatBody) -> Response:
    """Answer one request, at once or as a stream."""
    job = await chat_job(service, request, body)
    answer = _Answer(service, body)
    if body.stream:
        return EventStream(answer.events(await service.begin(request, job)))
    return Response(dumps(answer.whole(await service.whole(request, job))), media_type="application/json")


async def chat_job(service: Service, request: Request, body: ChatBody) -> Job:
    """What a chat asks of the engine, held to its form. Raises Problem for what cannot be asked."""
    require_model(body.model, service.settings.name)
    form, job = await aside(request, lambda: (_form(service, body), _job(service, request, body)))
    return await service.shaped(job, form)


def reader_of(service: Service, body: ChatBody) -> Reader:
    """What reads one of its answers."""
    style = style_of(service.llm.tokenizer.chat_template) if _may_call(body) else None
    return Reader(style, several=body.parallel_tool_calls)


def _job(service: Service, request: Request, body: ChatBody) -> Job:
    if body.top_logprobs is not None and not body.logprobs:
        raise Problem(
            400, "top_logprobs needs logprobs to be true.", code="invalid_value", param="top_logprobs"
        )
    llm = service.llm
    offered = [tool.model_dump(exclude_none=True) for tool in body.tools] if _may_call(body) else None
    prompts = [chat_ids(llm, body.messages, body.chat_template_kwargs, offered)]
    most = body.max_completion_tokens or body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = params_of(llm, body, prompts, max_tokens=most, logprobs=logprobs)
    if _may_call(body) and not body.parallel_tool_calls and style_of(llm.tokenizer.chat_template) == "tags":
        params = replace(params, stop=(*params.stop, CLOSE))  # the first call is the last
    return job_of(body, prompts, params, request.state.salt)


def _may_call(body: ChatBody) -> bool:
    return bool(body.tools) and body.tool_choice != "none"


def _form(service: Service, body: ChatBody) -> tuple[str, str] | None:
    """The form that is asked for: the body's own, or that of a call which must be made."""
    form, choice = form_of(body), body.tool_choice
    if choice is None or choice in ("none", "auto"):
        return form
    if not body.tools or form is not None:
        why = "needs tools." if form is None else f"{form[0]} forbids."
        what = f"tool_choice demands a call, which {why}"
        raise Problem(400, what, code="invalid_value", param="tool_choice")
    require_no_late_end(body, "tool_choice")
    functions = [tool.function.model_dump(exclude_none=True) for tool in body.tools]
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function["name"] == choice.function.name]
        if not functions:
            what = f"tool_choice names {choice.function.name!r}, which is not among the tools."
            raise Problem(400, what, code="invalid_value", param="tool_choice")
    several = body.parallel_tool_calls and not isinstance(choice, NamedTool)
    tokenizer = service.llm.tokenizer
    style = style_of(tokenizer.chat_template)
    tag_tokens = len(tokenizer.encode(OPEN, add_special_tokens=False)) == 1
    return "tools", lark_form(calls_grammar(functions, style, several=several, tag_tokens=tag_tokens))


class _Answer:
    """One request's response in the making."""

    def __init__(self, service: Service, body: ChatBody) -> None:
        self._tokenizer = service.llm.tokenizer
        self._body = body
        self._id = new_id("chatcmpl")
        self._created = int(time.time())
        self._model = service.settings.name
        self._readers = [reader_of(service, body) for _ in range(body.n)]

    def whole(self, answers: Sequence[Sequence[Chunk]]) -> dict[str, object]:
        """The response of a request that is not streamed."""
        ended = [chunk.completion for chunks in answers for chunk in chunks if chunk.completion]
        choices = [self._message(index, chunks) for index, chunks in enumerate(answers)]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(ended)}

    def _message(self, index: int, chunks: Sequence[Chunk]) -> dict[str, object]:
        reader = self._readers[index]
        deltas = reader.push("".join(chunk.text for chunk in chunks)) + reader.finish()
        rows = [row for chunk in chunks for row in chunk.logprobs or ()]
        rest = self._rest(rows, chunks[-1].completion, reader.calls)
        return {"index": index, "message": message_of(deltas), **rest}

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
                            calls = self._readers[index].calls
                            rest = self._rest(chunk.logprobs or [], chunk.completion, calls)
                        events.append(event_of(event(index, delta, rest)))
                if events:
                    yield b"".join(events)
        tail = event_of({**head, "choices": [], "usage": usage(ended)}) if with_usage else b""
        yield tail + DONE

    def _deltas(self, index: int, chunk: Chunk) -> list[dict[str, object]]:
        """What a chunk adds to the message; one empty delta where only its end or a logprob is to be told."""
        reader = self._readers[index]
        deltas = reader.push(chunk.text) + (reader.finish() if chunk.completion else [])
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
