"""Owns what all answers have in common as JSON: ids, usage, messages, and JSON in pieces."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from tiny_llm.data import AssistantMessage, Completion, MessageDelta

T = TypeVar("T")
_MANY = 1024  # values that are written in a moment
_AT_A_TIME = 32  # items of an array


def new_id(prefix: str) -> str:
    """An id of ours that nobody can guess."""
    return f"{prefix}-{secrets.token_hex(16)}"


def usage(ended: Iterable[Completion]) -> dict[str, object]:
    """Tokens read and made: a prompt counts once, whatever the number of its answers."""
    completions = list(ended)
    first = [completion for completion in completions if completion.index == 0]
    read = sum(len(completion.prompt_token_ids) for completion in first)
    made = sum(len(completion.token_ids) for completion in completions)
    cached = sum(completion.cached_tokens for completion in first)
    drafted = sum(completion.drafted_tokens for completion in completions)
    accepted = sum(completion.accepted_tokens for completion in completions)
    return {
        "prompt_tokens": read,
        "completion_tokens": made,
        "total_tokens": read + made,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }


def delta_json(delta: MessageDelta) -> dict[str, Any]:
    """What is new of a message, as the chat API has it."""
    call = delta.tool_call
    if call is None:
        return {"reasoning_content": delta.reasoning} if delta.reasoning else {"content": delta.content}
    if call.id is None:
        return {"tool_calls": [{"index": call.index, "function": {"arguments": call.arguments}}]}
    function = {"name": call.name, "arguments": call.arguments}
    return {"tool_calls": [{"index": call.index, "id": call.id, "type": "function", "function": function}]}


def message_json(message: AssistantMessage) -> dict[str, Any]:
    """A whole message, as the chat API has it."""
    told: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None}
    if message.reasoning is not None:
        told["reasoning_content"] = message.reasoning
    if message.tool_calls:
        functions = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
        told["tool_calls"] = [
            {"id": call.id, "type": "function", "function": function}
            for call, function in zip(message.tool_calls, functions, strict=True)
        ]
    return told


@dataclass(frozen=True, slots=True)
class WrittenArray:
    """An array whose ``items`` are JSON already, made as they are written, anew each time.

    All at once would be many times as large as what is written.
    """

    items: Callable[[], Iterable[str]]


def dumped(value: object) -> Iterator[bytes]:
    """``dumps`` in pieces: other threads run between two of them, and none runs during one."""
    if _weight(value) <= _MANY:
        yield dumps(value)
    elif isinstance(value, dict):
        yield b"{"
        for number, (name, item) in enumerate(value.items()):
            yield (b"," if number else b"") + dumps(name) + b":"
            yield from dumped(item)
        yield b"}"
    elif isinstance(value, WrittenArray):
        yield from _array(value.items(), lambda group: [",".join(group).encode()])
    else:
        assert isinstance(value, list), "nothing else is large"
        yield from _array(value, _dumped_items)


def _array(items: Iterable[T], written: Callable[[list[T]], Iterable[bytes]]) -> Iterator[bytes]:
    """An array, some of its items at a time."""
    left, before = iter(items), b"["
    while group := list(islice(left, _AT_A_TIME)):
        yield before
        yield from written(group)
        before = b","
    yield b"]" if before == b"," else b"[]"


def _dumped_items(items: list[object]) -> Iterator[bytes]:
    if _weight(items) <= _MANY:
        yield dumps(items)[1:-1]
        return
    for number, item in enumerate(items):
        yield b"," if number else b""
        yield from dumped(item)


def _weight(value: object) -> int:
    """How many values ``value`` consists of; only roughly beyond ``_MANY``."""
    total, stack = 0, [value]
    while stack and total <= _MANY:
        item = stack.pop()
        total += 1
        if isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, list):
            stack += item
        elif isinstance(item, WrittenArray):
            return _MANY + 1
    return total


def dumps(value: object) -> bytes:
    """Compact JSON, one line to whoever reads it."""
    return one_line(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))).encode()


def one_line(written: str) -> str:
    """JSON without what ends a line for some readers of a stream (httpx's, str.splitlines): it is escaped."""
    return written.replace("\x85", r"\u0085").replace("\u2028", r"\u2028").replace("\u2029", r"\u2029")
