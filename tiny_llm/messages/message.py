"""Owns a chat's message in the making: an answer's text to content, reasoning and tool calls.

Thoughts stand between ``<think>`` tags at an answer's beginning; many templates open them in the prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Literal

from tiny_llm.data import AssistantMessage, Chunk, MessageDelta, ToolCall, ToolCallDelta
from tiny_llm.decoding.grammar import THINK, THOUGHT
from tiny_llm.decoding.stop import open_length
from tiny_llm.messages.tool_parser import ToolParser

_State = Literal["before", "opened", "thinking", "closed", "content"]


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends in an opened tag, so that the answer begins with a thought."""
    return prompt.rstrip().endswith(THINK)


def closes_thinking(prompt: str) -> bool:
    """Whether a prompt ends in a closed thought, an empty one say: the answer is to begin without any."""
    return prompt.rstrip().endswith(THOUGHT)


class MessageParser:
    """One answer's text, in any pieces, to deltas of its message.

    ``tools`` None: none were offered, and whatever looks like a call is text. ``thinking``: the prompt has
    opened a thought. What may still become a tag is held back. Of the newlines that belong to the tags (one
    after the first, all after the second) nothing is told, nor of spaces before a tag.
    """

    def __init__(self, tools: ToolParser | None = None, *, thinking: bool = False) -> None:
        self._tools = tools
        self._state: _State = "opened" if thinking else "before"
        self._held = ""

    @property
    def is_thinking(self) -> bool:
        """Whether what comes now is the model's reasoning."""
        return self._state in ("opened", "thinking")

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
        self._held += text
        reasoning = ""
        while self._state != "content":
            state = self._state
            reasoning += self._advance()
            if self._state == state:  # it waits for more
                return self._deltas(reasoning, "")
        content, self._held = self._held, ""
        return self._deltas(reasoning, content)

    def finish(self) -> list[MessageDelta]:
        """No more text: return what was held back."""
        rest, self._held = self._held, ""
        deltas = self._deltas(rest, "") if self.is_thinking else self._deltas("", rest)
        return deltas + self._tools.finish() if self._tools else deltas

    def _deltas(self, reasoning: str, content: str) -> list[MessageDelta]:
        deltas = [MessageDelta(reasoning=reasoning)] if reasoning else []
        if not content:
            return deltas
        if self._tools:
            return deltas + self._tools.push(content)
        return [*deltas, MessageDelta(content=content)]

    def _advance(self) -> str:
        """Go on to the next state if the text says so; return the reasoning that was found on the way."""
        match self._state:
            case "before":
                begun = self._held.lstrip()
                if begun.startswith(THINK):
                    self._held, self._state = begun.removeprefix(THINK), "opened"
                elif not THINK.startswith(begun):
                    self._state = "content"
            case "opened":
                if self._held:
                    self._held, self._state = self._held.removeprefix("\n"), "thinking"
            case "thinking":
                return self._thought()
            case "closed":
                self._held = self._held.lstrip("\n")
                if self._held:
                    self._state = "before"
        return ""

    def _thought(self) -> str:
        thought, closed, rest = self._held.partition(THOUGHT)
        if closed:
            self._held, self._state = rest, "closed"
            return thought
        end = len(self._held) - open_length(self._held, (THOUGHT,))
        thought, self._held = self._held[:end], self._held[end:]
        return thought


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
