"""Owns tool calls in a model's text: told from what it says, as it streams.

Two formats: Qwen2.5's and Hermes' ``<tool_call>`` tags around {"name", "arguments"}, and LLaMA 3's bare
{"name", "parameters"}. What is certain is given out; a call never shows as text, and what turns out to be no
call does. Knows no reasoning, and not which functions there are.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Literal

from tiny_llm.data import MessageDelta, ToolCallDelta
from tiny_llm.decoding.stop import open_length

ToolFormat = Literal["hermes", "llama3_json"]
OPEN, CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""A call up to its arguments, as models nearly always write it: these can be streamed."""
_TAIL: Mapping[ToolFormat, re.Pattern[str]] = {
    "hermes": re.compile(rf"\s*\}}\s*{CLOSE}"),
    "llama3_json": re.compile(r"\s*\}"),
}


def tool_format_of(template: str) -> ToolFormat:
    """How a model with this chat template writes its calls."""
    return "llama3_json" if OPEN not in template and '"parameters"' in template else "hermes"


class ToolParser:
    """One answer's text, in any pieces, to content and calls.

    Unless ``parallel`` calls are wanted, what follows a bare one is dropped; tags have an end, where the
    answer is stopped. ``calls`` counts those that have begun.
    """

    def __init__(self, tool_format: ToolFormat, *, parallel: bool = True) -> None:
        self.calls = 0
        self._format = tool_format
        self._parallel = parallel
        self._advance = self._between if tool_format == "llama3_json" else self._talking
        self._text = ""
        self._arguments: _JsonObject | None = None

    def push(self, text: str) -> list[MessageDelta]:
        """Take the next piece; return what is certain now."""
        self._text += text
        found: list[MessageDelta] = []
        while self._advance(found):
            pass
        return found

    def finish(self) -> list[MessageDelta]:
        """No more text: return what was held back."""
        rest, self._text = self._text, ""
        if self._advance == self._calling:
            if self._arguments is not None:  # cut off in the middle: what there is has been sent
                return []
            call = self._whole(rest.removesuffix(CLOSE))
            opening = OPEN if self._format == "hermes" else ""
            return [call] if call else _content(opening + rest)
        if self.calls and not rest.strip():
            return []
        return _content(rest)

    # The states. Each takes what it can of the text, and says whether another one goes on with the rest.

    def _between(self, found: list[MessageDelta]) -> bool:
        """A bare call can only be at the beginning, or after another one."""
        if self.calls and not self._parallel:
            self._text = ""
            return False
        begun = self._text.lstrip("; \n") if self.calls else self._text.lstrip()
        call = begun.removeprefix(_PYTHON_TAG)
        may_be_tag = self._text.lstrip().startswith("<|")
        if not call or (may_be_tag and not call.startswith("{")):
            return False
        if call.startswith("{"):
            self._text, self._advance = call, self._calling
        else:
            self._advance = self._talking
        return True

    def _talking(self, found: list[MessageDelta]) -> bool:
        if self._format == "llama3_json":
            self._say(found, len(self._text))
            return False
        said, opened, rest = self._text.partition(OPEN)
        if opened:
            found += _content(said.rstrip())
            self._text, self._advance = rest, self._calling
            return True
        certain = self._text[: len(self._text) - open_length(self._text, (OPEN,))]
        self._say(found, len(certain.rstrip()))  # spaces before a call go with it
        return False

    def _calling(self, found: list[MessageDelta]) -> bool:
        if self._arguments is None:
            head = _HEAD.match(self._text)
            if head is None:
                return self._unusual(found)
            self._arguments = _JsonObject(head.end())
            found.append(self._call(json.loads(f'"{head[1]}"', strict=False), ""))
        new = self._arguments.look(self._text)
        if new:
            found.append(MessageDelta(tool_call=ToolCallDelta(self.calls - 1, new)))
        if self._arguments.end is None:
            return False
        tail = _TAIL[self._format].match(self._text, self._arguments.end)
        if tail is None:
            return False
        self._leave(tail.end())
        return True

    def _unusual(self, found: list[MessageDelta]) -> bool:
        """A call that does not begin as usual: wait for its end, and see."""
        at = self._text.find(CLOSE) if self._format == "hermes" else -1
        if at < 0:
            return False
        call = self._whole(self._text[:at])
        end = at + len(CLOSE)
        found += [call] if call else _content(OPEN + self._text[:end])
        self._leave(end)
        return True

    def _leave(self, end: int) -> None:
        """A call has ended there."""
        self._text, self._arguments = self._text[end:], None
        self._advance = self._between if self._format == "llama3_json" else self._talking

    def _whole(self, text: str) -> MessageDelta | None:
        """The call that a text is, None if it is none."""
        try:
            told = json.loads(text)
            arguments = told["arguments"] if "arguments" in told else told["parameters"]
            name = told["name"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return self._call(name, json.dumps(arguments))

    def _call(self, name: str, arguments: str) -> MessageDelta:
        index, self.calls = self.calls, self.calls + 1
        call_id = f"call-{secrets.token_hex(16)}"  # nobody can guess another conversation's
        return MessageDelta(tool_call=ToolCallDelta(index, arguments, call_id, name))

    def _say(self, found: list[MessageDelta], end: int) -> None:
        """The text up to there is content."""
        found += _content(self._text[:end])
        self._text = self._text[end:]


class _JsonObject:
    """Finds the end of a JSON object that comes in pieces; looks at each character once."""

    def __init__(self, start: int) -> None:
        self.end: int | None = None
        self._at = start
        self._depth = 0
        self._quoted = self._escaped = False

    def look(self, text: str) -> str:
        """What is new of the object in ``text``, which has grown since last asked."""
        start = self._at
        while self.end is None and self._at < len(text):
            self._step(text[self._at])
            self._at += 1
            if not self._depth:
                self.end = self._at
        return text[start : self._at]

    def _step(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped = char == "\\"
            self._quoted = char != '"'
        elif char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1


def _content(text: str) -> list[MessageDelta]:
    return [MessageDelta(content=text)] if text else []
