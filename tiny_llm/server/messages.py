"""Owns POST /v1/messages and /v1/messages/count_tokens: a conversation in Anthropic's words.

A request is a chat in other words, so a chat is what the engine is asked; its answer is told as blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from tiny_llm.data import Chunk, Completion, MessageDelta
from tiny_llm.messages.chat_format import ChatFormat
from tiny_llm.server.answers import new_id
from tiny_llm.server.chat_completions import chat_job, chat_prompt
from tiny_llm.server.events import ResponseWriter, answered, event_of
from tiny_llm.server.jobs import Job
from tiny_llm.server.message_bodies import CountBody, MessageBody, chat_of
from tiny_llm.server.problems import problem_of, renamed
from tiny_llm.server.service import Service, aside

_THEIR_NAMES = (
    (r"response_format\.json_schema", "output_config.format.schema"),
    (r"response_format", "output_config.format"),
    (r"reasoning_effort", "output_config.effort"),
    (r"chat_template_kwargs\.enable_thinking", "thinking"),
    (r"(tools\[\d+\])\.function\.parameters", r"\1.input_schema"),
    (r"(tools\[\d+\])\.function", r"\1"),
)
_STARTS: Mapping[str, Mapping[str, Any]] = {
    "text": {"text": "", "citations": None},
    "thinking": {"thinking": "", "signature": ""},
}
_REASONS: Mapping[str, str] = {"length": "max_tokens", "stop": "end_turn"}


async def message(service: Service, request: Request, body: MessageBody) -> Response:
    """Answer one request, at once or as a stream."""
    with renamed(_THEIR_NAMES):
        return await answered(service, request, body, _asking)


async def count(service: Service, request: Request, body: CountBody) -> dict[str, int]:
    """How many tokens a request's prompt has."""
    service.require_model(body.model)
    with renamed(_THEIR_NAMES):
        _, prompt, _ = await aside(request, lambda: chat_prompt(service.llm, chat_of(body)))
    return {"input_tokens": len(prompt)}


def _asking(service: Service, body: MessageBody, key_salt: str) -> tuple[Job, MessageWriter]:
    form, job = chat_job(service.llm, chat_of(body), key_salt, cut=True)
    return job, MessageWriter(service.settings.name, form, body.max_tokens, len(job.prompts[0]))


class MessageWriter(ResponseWriter):
    """/v1/messages' words: the message, each block as it grows, why it ended."""

    end = b""

    def __init__(self, model: str, form: ChatFormat, most: int, prompt_tokens: int) -> None:
        self._parser = form.parser()
        self._most, self._read = most, prompt_tokens
        self._blocks: list[dict[str, Any]] = []
        self._arguments: list[str] = []  # of the open block, a call
        self._is_open = False
        self._head = {"id": new_id("msg"), "type": "message", "role": "assistant", "model": model}

    def whole(self, answers: Sequence[Sequence[Chunk]], ended: Sequence[Completion]) -> dict[str, Any]:
        """The message of a request that is not streamed: what its events come to."""
        for chunk in answers[0]:
            for _ in self._told(chunk):
                pass
        return {**self._head, "content": self._blocks, **self._why(ended[0]), "usage": _usage(ended[0])}

    def opening(self) -> bytes:
        """That there is a message; what of its prompt was found in the cache is told at its end."""
        usage = {"input_tokens": self._read, "output_tokens": 0}
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return _written({"type": "message_start", "message": message})

    def events(self, index: int, chunk: Chunk) -> bytes:
        """How the blocks grow by a chunk."""
        return b"".join(map(_written, self._told(chunk)))

    def closing(self, ended: Sequence[Completion]) -> bytes:
        """Why it ended, and what it took."""
        delta = {"type": "message_delta", "delta": self._why(ended[0]), "usage": _usage(ended[0])}
        return _written(delta) + _written({"type": "message_stop"})

    def failure(self, error: Exception) -> bytes:
        """A fault in the interface's own form."""
        return _written(problem_of(error).anthropic_body)

    def _told(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """Take a chunk in; what it is told by."""
        deltas = self._parser.push(chunk.text)
        if chunk.completion is not None:
            deltas += self._parser.finish()
        for delta in deltas:
            yield from self._grown(delta)
        if chunk.completion is not None:
            yield from self._closed()

    def _grown(self, delta: MessageDelta) -> Iterator[dict[str, Any]]:
        call = delta.tool_call
        if call is not None:
            if call.id is not None:
                yield from self._begun({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
            if call.arguments:
                self._arguments.append(call.arguments)
                yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})
            return
        kind, text = ("thinking", delta.reasoning) if delta.reasoning else ("text", delta.content)
        if not self._is_open or self._blocks[-1]["type"] != kind:
            yield from self._begun({"type": kind, **_STARTS[kind]})
        self._blocks[-1][kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _begun(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._closed()
        self._blocks.append(block)
        self._is_open = True
        yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _closed(self) -> Iterator[dict[str, Any]]:
        if not self._is_open:
            return
        self._is_open = False
        if self._arguments:
            self._blocks[-1]["input"] = _input("".join(self._arguments))
            self._arguments.clear()
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _why(self, ended: Completion) -> dict[str, Any]:
        reason = _REASONS[ended.finish_reason]
        if ended.stop_string is not None:
            reason = "stop_sequence"
        elif ended.finish_reason == "stop" and self._parser.calls:
            reason = "tool_use"
        elif ended.finish_reason == "length" and len(ended.token_ids) < self._most:
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": ended.stop_string}


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments; none where the answer was cut short among them."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _usage(ended: Completion) -> dict[str, Any]:
    """What was found in the cache is not counted as read, as it is there."""
    found = ended.cached_tokens
    return {
        "input_tokens": len(ended.prompt_token_ids) - found,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": found,
        "output_tokens": len(ended.token_ids),
    }


def _written(event: Mapping[str, Any]) -> bytes:
    return f"event: {event['type']}\n".encode() + event_of(event)
