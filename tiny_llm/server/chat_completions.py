"""Owns POST /v1/chat/completions: a conversation's next message."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from fastapi import Request
from fastapi.responses import Response

from tiny_llm.data import Chunk, Completion
from tiny_llm.server.answers import DONE, EventStream, chat_logprobs, dumps, event_of, new_id, usage
from tiny_llm.server.bodies import ChatBody
from tiny_llm.server.params import chat_ids, form_of, job_of, params_of, require_model
from tiny_llm.server.problems import Problem
from tiny_llm.server.service import Job, Piece, Service


async def chat(service: Service, request: Request, body: ChatBody) -> Response:
    """Answer one request, at once or as a stream."""
    require_model(body.model, service.settings.name)
    form = await asyncio.to_thread(form_of, body)
    job = await service.shaped(await asyncio.to_thread(_job, service, request, body), form)
    answer = _Answer(service, body)
    if body.stream:
        return EventStream(answer.events(await service.begin(request, job)))
    return Response(dumps(answer.whole(await service.whole(request, job))), media_type="application/json")


def _job(service: Service, request: Request, body: ChatBody) -> Job:
    if body.top_logprobs is not None and not body.logprobs:
        raise Problem(
            400, "top_logprobs needs logprobs to be true.", code="invalid_value", param="top_logprobs"
        )
    llm = service.llm
    prompts = [chat_ids(llm, body.messages, body.chat_template_kwargs)]
    most = body.max_completion_tokens or body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = params_of(llm, body, prompts, max_tokens=most, logprobs=logprobs)
    return job_of(body, prompts, params, request.state.salt)


class _Answer:
    """One request's response in the making."""

    def __init__(self, service: Service, body: ChatBody) -> None:
        self._tokenizer = service.llm.tokenizer
        self._body = body
        self._id = new_id("chatcmpl")
        self._created = int(time.time())
        self._model = service.settings.name

    def whole(self, answers: Sequence[Sequence[Chunk]]) -> dict[str, object]:
        """The response of a request that is not streamed."""
        ended = [chunk.completion for chunks in answers for chunk in chunks if chunk.completion]
        choices = [self._message(index, chunks) for index, chunks in enumerate(answers)]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(ended)}

    def _message(self, index: int, chunks: Sequence[Chunk]) -> dict[str, object]:
        text = "".join(chunk.text for chunk in chunks)
        rows = [row for chunk in chunks for row in chunk.logprobs or ()]
        message = {"role": "assistant", "content": text, "refusal": None}
        ended = chunks[-1].completion
        return {"index": index, "message": message, **self._rest(rows, ended)}

    async def events(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[bytes, None]:
        """The response of a request that is: who speaks, then what it says, then why it ended."""
        options, ended, begun = self._body.stream_options, [], set[int]()
        head = self._head("chat.completion.chunk")
        with_usage = {"usage": None} if options is not None and options.include_usage else {}
        async with aclosing(pieces):
            async for index, chunk in pieces:
                delta: dict[str, object] = {} if index in begun else {"role": "assistant", "content": ""}
                begun.add(index)
                if chunk.text:
                    delta["content"] = chunk.text
                if chunk.completion is not None:
                    ended.append(chunk.completion)
                if delta or chunk.logprobs or chunk.completion:
                    rest = self._rest(chunk.logprobs or [], chunk.completion)
                    choice = {"index": index, "delta": delta, **rest}
                    yield event_of({**head, "choices": [choice], **with_usage})
        if with_usage:
            yield event_of({**head, "choices": [], "usage": usage(ended)})
        yield DONE

    def _rest(self, rows: Sequence[dict[int, float]], ended: Completion | None) -> dict[str, object]:
        told = None
        if self._body.logprobs:
            told = {
                "content": chat_logprobs(self._tokenizer, rows, self._body.top_logprobs or 0),
                "refusal": None,
            }
        return {"logprobs": told, "finish_reason": None if ended is None else ended.finish_reason}

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}
