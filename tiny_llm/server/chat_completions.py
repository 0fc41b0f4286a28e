"""Owns POST /v1/chat/completions: a conversation's next message."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from tiny_llm.data import Chunk, Completion
from tiny_llm.engine.llm import LLM
from tiny_llm.messages.chat_format import ChatFormat
from tiny_llm.messages.message import message_of
from tiny_llm.server.answers import delta_json, message_json, new_id, usage
from tiny_llm.server.chat_bodies import ChatBody, NamedTool
from tiny_llm.server.events import ResponseWriter, answered, event_of, events_around
from tiny_llm.server.jobs import Job
from tiny_llm.server.logprobs import LogprobWriter
from tiny_llm.server.params import chat_ids, grammar_of, job_of, params_of, require_model, stream_usage
from tiny_llm.server.problems import Problem
from tiny_llm.server.service import Service, aside


async def chat(service: Service, request: Request, body: ChatBody) -> Response:
    """Answer one request, at once or as a stream."""
    form, job = await chat_job(service, request, body)
    return await answered(service, request, job, ChatWriter(service, body, form, job), stream=body.stream)


async def chat_job(service: Service, request: Request, body: ChatBody) -> tuple[ChatFormat, Job]:
    """How a chat's answers are read, and what it asks of the engine.

    Raises Problem or RequestError for what cannot be asked.
    """
    require_model(body.model, service.settings.name)
    return await aside(request, lambda: _form_and_job(service.llm, body, request.state.salt))


def _form_and_job(llm: LLM, body: ChatBody, key_salt: str) -> tuple[ChatFormat, Job]:
    if body.top_logprobs and not body.logprobs:
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
    asked = (body.messages, body.chat_template_kwargs, form.tools, body.reasoning_effort)
    prompts = [chat_ids(llm, *asked)]
    form = form.after(llm.tokenizer, prompts[0])
    most = body.max_completion_tokens or body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = params_of(llm, body, prompts, max_tokens=most, logprobs=logprobs)
    if body.prediction is not None:
        # What is beyond the longest answer would only have to be read.
        text = body.prediction.content[: params.max_tokens * llm.tokenizer.longest_token]
        expected = llm.tokenizer.encode(text, add_special_tokens=False)
        params = replace(params, prediction=tuple(expected))
    return form, job_of(body, prompts, form.params(params), key_salt, form.grammar)


class ChatWriter(ResponseWriter):
    """/v1/chat/completions' words."""

    def __init__(self, service: Service, body: ChatBody, form: ChatFormat, job: Job) -> None:
        self._body = body
        self._logprobs = LogprobWriter(service.llm.tokenizer, body.top_logprobs or 0)
        self._id = new_id("chatcmpl")
        self._created = int(time.time())
        self._model = service.settings.name
        self._parsers = [form.parser() for _ in range(body.n)]
        self._usage = stream_usage(body.stream_options, job)
        self._quick: dict[int, Callable[[str], bytes]] = {}  # of answers that began: only their text changes

    def whole(self, answers: Sequence[Sequence[Chunk]], ended: Sequence[Completion]) -> dict[str, object]:
        """The response of a request that is not streamed."""
        choices = [self._choice(index, chunks, ended[index]) for index, chunks in enumerate(answers)]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(ended)}

    def _choice(self, index: int, chunks: Sequence[Chunk], ended: Completion) -> dict[str, object]:
        parser = self._parsers[index]
        deltas = parser.push("".join(chunk.text for chunk in chunks)) + parser.finish()
        rows: list[dict[int, float]] = []
        for chunk in chunks:
            rows += chunk.logprobs or ()
        rest = self._rest(rows, ended, parser.calls)
        return {"index": index, "message": message_json(message_of(deltas)), **rest}

    def events(self, index: int, chunk: Chunk) -> bytes:
        """Who speaks, then what is said, an event a delta; the last of a chunk has its log-probabilities."""
        self._usage.take(index, chunk)
        found = self._parsers[index].push(chunk.text)
        is_text_alone = chunk.completion is None and not chunk.logprobs
        begun = index in self._quick
        is_quick = begun and is_text_alone and not self._usage.always
        if is_quick and len(found) == 1 and found[0].content:
            return self._quick[index](found[0].content)
        if chunk.completion is not None:
            found += self._parsers[index].finish()
        deltas = [delta_json(delta) for delta in found]
        if not deltas and not is_text_alone:
            deltas = [{}]  # its end, or its log-probabilities, are to be told
        if not begun:
            self._quick[index] = events_around(partial(self._saying, index))
            deltas.insert(0, {"role": "assistant", "content": ""})
        return b"".join(self._delta_events(index, deltas, chunk))

    def closing(self, ended: Sequence[Completion]) -> bytes:
        """The usage, where it was asked for."""
        if not self._usage.at_end:
            return b""
        head = self._head("chat.completion.chunk")
        return event_of({**head, "choices": [], "usage": usage(ended)})

    def _delta_events(self, index: int, deltas: Sequence[dict[str, Any]], chunk: Chunk) -> Iterator[bytes]:
        for delta in deltas[:-1]:
            yield event_of(self._event(index, delta, self._rest([], None, 0)))
        if deltas:
            rest = self._rest(chunk.logprobs or [], chunk.completion, self._parsers[index].calls)
            yield event_of(self._event(index, deltas[-1], rest))

    def _saying(self, index: int, text: str) -> dict[str, object]:
        return self._event(index, {"content": text}, self._rest([], None, 0))

    def _event(self, index: int, delta: dict[str, Any], rest: dict[str, object]) -> dict[str, object]:
        choice = {"index": index, "delta": delta, **rest}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **self._usage.so_far(index)}

    def _rest(
        self, rows: Sequence[dict[int, float]], ended: Completion | None, calls: int
    ) -> dict[str, object]:
        """What a choice has beside its message: log-probabilities, and why it ended if it has."""
        told = None
        if self._body.logprobs:
            told = {"content": self._logprobs.chat(rows), "refusal": None}
        reason: str | None = None if ended is None else ended.finish_reason
        if reason == "stop" and calls:
            reason = "tool_calls"
        return {"logprobs": told, "finish_reason": reason}

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}
