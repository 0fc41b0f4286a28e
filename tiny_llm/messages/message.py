"""Owns a chat's message in the making: an answer's text to content, reasoning and tool calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace

from tiny_llm.data import AssistantMessage, Chunk, MessageDelta, ToolCall, ToolCallDelta
from tiny_llm.messages.reasoning import ReasoningParser, Split
from tiny_llm.messages.tool_parser import ToolParser


class MessageParser:
    """One answer's text, in any pieces, to deltas of its message.

    ``tools`` None: none were offered, and whatever looks like a call is text. ``thinking``: the prompt has
    opened a thought.
    """

    def __init__(self, tools: ToolParser | None = None, *, thinking: bool = False) -> None:
        self._reasoning = ReasoningParser(opened=thinking)
        self._tools = tools

    @property
    def is_thinking(self) -> bool:
        """Whether what comes now is the model's reasoning."""
        return self._reasoning.is_thinking

    @property
    def is_over(self) -> bool:
        """Whether the only call that is wanted has been made: what follows it is dropped."""
        return self._tools is not None and self._tools.is_over

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return self._tools.calls if self._tools else 0

    def push(self, text: str) -> list[MessageDelta]:
        """Take the next piece; return what is certain now."""
        return self._deltas(self._reasoning.push(text))

    def finish(self) -> list[MessageDelta]:
        """No more text: return what was held back."""
        deltas = self._deltas(self._reasoning.finish())
        return deltas + self._tools.finish() if self._tools else deltas

    def _deltas(self, split: Split) -> list[MessageDelta]:
        deltas = [MessageDelta(reasoning=split.reasoning)] if split.reasoning else []
        if not split.content:
            return deltas
        if self._tools:
            return deltas + self._tools.push(split.content)
        return [*deltas, MessageDelta(content=split.content)]


def message_of(deltas: Sequence[MessageDelta]) -> AssistantMessage:
    """The whole message that deltas make."""
    content = "".join(delta.content for delta in deltas)
    reasoning = "".join(delta.reasoning for delta in deltas)
    parts = [delta.tool_call for delta in deltas if delta.tool_call is not None]
    calls = tuple(_whole_call(part, parts) for part in parts if part.id is not None)
    return AssistantMessage(
        content=None if calls and not content else content, reasoning=reasoning or None, tool_calls=calls
    )


def _whole_call(first: ToolCallDelta, parts: Sequence[ToolCallDelta]) -> ToolCall:
    assert first.id is not None and first.name is not None, "a call's first delta has both"
    arguments = "".join(part.arguments for part in parts if part.index == first.index)
    return ToolCall(first.id, first.name, arguments)


def with_messages(chunks: Generator[Chunk], make_parser: Callable[[], MessageParser]) -> Generator[Chunk]:
    """The chunks of a chat's answers, each with its deltas, and the last of an answer with its message.

    Whoever leaves early closes ``chunks``, too.
    """
    parsers: dict[int, MessageParser] = defaultdict(make_parser)
    told: dict[int, list[MessageDelta]] = defaultdict(list)
    with closing(chunks):
        for chunk in chunks:
            parser, ended = parsers[chunk.index], chunk.completion
            deltas = parser.push(chunk.text)
            if ended is not None:
                deltas += parser.finish()
            told[chunk.index] += deltas
            if ended is not None:
                ended = replace(ended, message=message_of(told[chunk.index]))
            yield replace(chunk, deltas=deltas, completion=ended)
