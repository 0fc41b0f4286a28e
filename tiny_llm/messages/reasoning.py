"""Owns what a model thinks: told from what it says, as its text streams.

Thoughts stand between ``<think>`` tags at an answer's beginning; many templates open them in
the prompt. Knows no calls and no message.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from tiny_llm.decoding.grammar import THINK, THOUGHT
from tiny_llm.decoding.stop import open_length

_State = Literal["before", "opened", "thinking", "closed", "content"]


class Split(NamedTuple):
    """Text told apart: what is ``reasoning`` comes before what is ``content``."""

    reasoning: str
    content: str


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends in an opened tag, so that the answer begins with a thought."""
    return prompt.rstrip().endswith(THINK)


def closes_thinking(prompt: str) -> bool:
    """Whether a prompt ends in a closed thought, an empty one say: the answer is to begin without any."""
    return prompt.rstrip().endswith(THOUGHT)


class ReasoningParser:
    """One answer's text, in any pieces, to reasoning and content.

    What may still become a tag is held back. Of the newlines that belong to the tags (one after the first,
    all after the second) nothing is told, nor of spaces before a tag. ``opened``: the prompt ends in a tag.
    """

    def __init__(self, *, opened: bool = False) -> None:
        self._state: _State = "opened" if opened else "before"
        self._held = ""

    @property
    def is_thinking(self) -> bool:
        """Whether what comes now is reasoning."""
        return self._state in ("opened", "thinking")

    @property
    def _is_over(self) -> bool:
        return self._state == "content"

    def push(self, text: str) -> Split:
        """Take the next piece; return what is certain now."""
        if self._is_over:
            return Split("", text)
        self._held += text
        reasoning = ""
        while not self._is_over:
            state = self._state
            reasoning += self._advance()
            if self._state == state:  # it waits for more
                return Split(reasoning, "")
        content, self._held = self._held, ""
        return Split(reasoning, content)

    def finish(self) -> Split:
        """No more text: return what was held back."""
        rest, self._held = self._held, ""
        return Split(rest, "") if self.is_thinking else Split("", rest)

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
