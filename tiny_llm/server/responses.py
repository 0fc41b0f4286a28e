"""Owns POST /v1/responses: a conversation's next items, at once or as events that say how they grow.

A request is a chat in other words, so a chat is what the engine is asked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic import TypeAdapter

from tiny_llm.data import Chunk, Completion
from tiny_llm.messages.chat_format import ChatFormat
from tiny_llm.server.answers import dumped, new_id
from tiny_llm.server.chat_completions import chat_job
from tiny_llm.server.events import ResponseWriter, answered, event_of
from tiny_llm.server.jobs import Job
from tiny_llm.server.logprobs import LogprobWriter
from tiny_llm.server.problems import Problem, problem_of, renamed
from tiny_llm.server.response_bodies import AnyItem, Item, ResponseBody, chat_of
from tiny_llm.server.response_items import Items
from tiny_llm.server.service import Service
from tiny_llm.server.settings import MAX_MESSAGES
from tiny_llm.server.stored import StoredResponses

_Keep = Callable[[dict[str, Any]], None]
_ITEMS: TypeAdapter[list[AnyItem]] = TypeAdapter(list[Item])
_THEIR_NAMES = (
    (r"response_format\.json_schema", "text.format.schema"),
    (r"response_format", "text.format"),
    (r"messages", "input"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"(tools\[\d+\])\.function", r"\1"),
)

_REPEATED = (
    "instructions",
    "max_output_tokens",
    "parallel_tool_calls",
    "temperature",
    "tool_choice",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "metadata",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "previous_response_id",
    "store",
)
"""What a response says again of its request."""
_ALWAYS: Mapping[str, Any] = {
    "error": None,
    "incomplete_details": None,
    "background": False,
    "max_tool_calls": None,
    "service_tier": "default",
    "truncation": "disabled",
}
"""What holds for every response here, and every schema of a response wants to be told."""


_TOOL_KEYS: Mapping[str, Any] = {"description": None, "parameters": None, "strict": None}
_FORM_KEYS: Mapping[str, Any] = {"name": "answer", "description": None, "schema": {}, "strict": False}
"""What a response must have of a tool, and of a form, that the request need not say."""


async def respond(
    service: Service, stored: StoredResponses, request: Request, body: ResponseBody
) -> Response:
    """Answer one request, at once or as a stream; keep the response among those that are ``stored``."""
    asked_bytes = request.state.body_bytes

    def asking(service: Service, body: ResponseBody, key_salt: str) -> tuple[Job, ResponsesWriter]:
        before = body.previous_response_id
        said = body.input
        if before is not None:
            found = stored.get(key_salt, before, "previous_response_id")
            answered_before = _ITEMS.validate_python(json.loads(found.response)["output"])
            said = [*found.items, *answered_before, *said]
            if len(said) > MAX_MESSAGES:
                what = f"input and what came before it have {len(said)} items, but may have at most"
                raise Problem(400, f"{what} {MAX_MESSAGES}.", code="invalid_value", param="input")
        form, job = chat_job(service.llm, chat_of(body.model_copy(update={"input": said})), key_salt)

        def keep(response: dict[str, Any]) -> None:
            if body.store:
                stored.add(key_salt, response["id"], b"".join(dumped(response)), said, asked_bytes)

        return job, ResponsesWriter(service, body, form, keep)

    with renamed(_THEIR_NAMES):
        return await answered(service, request, body, asking)


class ResponsesWriter(ResponseWriter):
    """/v1/responses' words: what the response is, each item as it grows, what it came to."""

    def __init__(self, service: Service, body: ResponseBody, form: ChatFormat, keep: _Keep) -> None:
        self._keep = keep
        self._body = body
        self._parser = form.parser()
        self._items = Items(LogprobWriter(service.llm.tokenizer, body.top_logprobs or 0).chat)
        self._thought_tokens = 0
        self._count = 0
        self._head = _head(body, service.settings.name)

    def whole(self, answers: Sequence[Sequence[Chunk]], ended: Sequence[Completion]) -> dict[str, Any]:
        """The response of a request that is not streamed: what its events come to."""
        for chunk in answers[0]:
            self._told(chunk)
        response = self._response(ended[0])
        self._keep(response)
        return response

    def opening(self) -> bytes:
        """That there is a response."""
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._event({"type": kind, "response": self._response(None)}) for kind in kinds)

    def events(self, index: int, chunk: Chunk) -> bytes:
        """How the items grow by a chunk."""
        return b"".join(self._event(event) for event in self._told(chunk))

    def closing(self, ended: Sequence[Completion]) -> bytes:
        """The whole response."""
        response = self._response(ended[0])
        self._keep(response)
        return self._event({"type": f"response.{response['status']}", "response": response})

    def failure(self, error: Exception) -> bytes:
        """A fault in the interface's own form, and in the one that its clients raise an error for."""
        problem = problem_of(error)
        told = {"message": problem.detail, "code": problem.code, "param": problem.param}
        return self._event({"type": "error", **told, **problem.body})

    def _event(self, event: dict[str, Any]) -> bytes:
        self._count += 1
        numbered = event_of({**event, "sequence_number": self._count - 1})
        return f"event: {event['type']}\n".encode() + numbered

    def _told(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Take a chunk in; return what it is told by."""
        was_thinking = self._parser.is_thinking
        deltas = self._parser.push(chunk.text)
        if was_thinking or self._parser.is_thinking:
            self._thought_tokens += len(chunk.token_ids)
        if chunk.completion is not None:
            deltas += self._parser.finish()
        told = self._items.push(deltas, chunk.logprobs or ())
        if chunk.completion is not None:
            told += self._items.finish(whole=chunk.completion.finish_reason != "length")
        return told

    def _response(self, ended: Completion | None) -> dict[str, Any]:
        """The response as it is now."""
        if ended is None:
            return {**self._head, "status": "in_progress", "output": [], "usage": None}
        cut = ended.finish_reason == "length"
        read, made = len(ended.prompt_token_ids), len(ended.token_ids)
        return {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._items.done,
            "usage": {
                "input_tokens": read,
                "input_tokens_details": {"cached_tokens": ended.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": made,
                "output_tokens_details": {"reasoning_tokens": self._thought_tokens},
                "total_tokens": read + made,
            },
        }


def _head(body: ResponseBody, model: str) -> dict[str, Any]:
    """What a response repeats of its request, and what it says while there is nothing else to say."""
    given = body.model_dump(mode="json", by_alias=True, include=set(_REPEATED))
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "model": model,
        **_ALWAYS,
        **given,
        "reasoning": body.reasoning and {"effort": body.reasoning.effort, "summary": None},
        "text": {"format": _repeated_format(body)},
        "tools": [{**_TOOL_KEYS, **tool.model_dump(exclude_none=True)} for tool in body.tools],
        "top_logprobs": body.top_logprobs or 0,
    }


def _repeated_format(body: ResponseBody) -> dict[str, Any]:
    asked = body.text.format
    if asked is None:
        return {"type": "text"}
    given = asked.model_dump(by_alias=True, exclude_none=True)
    return {**_FORM_KEYS, **given} if asked.type == "json_schema" else given
