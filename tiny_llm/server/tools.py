"""Owns tool calls and reasoning in a model's text: read as it streams, and demanded by a grammar.

Two ways to write a call: Qwen2.5's and Hermes' ``<tool_call>`` tags around {"name", "arguments"}, and
LLaMA 3's bare {"name", "parameters"}. What the model thinks stands between ``<think>`` tags at its
answer's beginning. A reader gives out what is certain; a call never shows as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tiny_llm.decoding.stop import open_length
from tiny_llm.server.answers import new_id

Style = Literal["tags", "bare"]
OPEN, CLOSE = "<tool_call>", "</tool_call>"
_THINK, _THOUGHT = "<think>", "</think>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_TAIL: Mapping[Style, re.Pattern[str]] = {
    "tags": re.compile(rf"\s*\}}\s*{CLOSE}"),
    "bare": re.compile(r"\s*\}"),
}


def style_of(template: str) -> Style:
    """How a model with this chat template writes its calls."""
    return "bare" if OPEN not in template and '"parameters"' in template else "tags"


def calls_grammar(
    functions: Sequence[Mapping[str, Any]], style: Style, *, several: bool, tag_tokens: bool
) -> str:
    """A grammar, in Lark's notation, of answers that call one of ``functions``, or ``several``.

    ``tag_tokens``: the tags are tokens of their own, which llguidance must be told.
    """
    key = "arguments" if style == "tags" else "parameters"
    options = [_call_schema(function, key) for function in functions]
    spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    call = json.dumps({"anyOf": options, "x-guidance": spaces})
    if style == "bare":
        more = ' ("; " call)*' if several else ""
        return f"start: call{more}\ncall: %json {call}\n"
    more = ' ("\\n" call)*' if several else ""
    before, after = (OPEN, CLOSE) if tag_tokens else (f'"{OPEN}"', f'"{CLOSE}"')
    return f'start: call{more}\ncall: {before} "\\n" body "\\n" {after}\nbody: %json {call}\n'


def _call_schema(function: Mapping[str, Any], key: str) -> dict[str, Any]:
    parameters = dict(function.get("parameters") or {"type": "object", "properties": {}})
    parameters.setdefault("type", "object")
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, key: parameters},
        "required": ["name", key],
        "additionalProperties": False,
    }


class _Value:
    """Finds the end of a JSON object that comes in pieces; looks at each character once."""

    def __init__(self, start: int) -> None:
        self.sent = self._at = start
        self.end: int | None = None
        self._depth = 0
        self._quoted = self._escaped = False

    def look(self, text: str) -> str:
        """What is new of the object in ``text``, which has grown since last asked."""
        while self.end is None and self._at < len(text):
            self._step(text[self._at])
            self._at += 1
            if not self._depth:
                self.end = self._at
        new = text[self.sent : self._at]
        self.sent = self._at
        return new

    def _step(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped, self._quoted = char == "\\", char != '"'
        elif char == '"':
            self._quoted = True
        else:
            self._depth += (char in "{[") - (char in "}]")


class Reader:
    """One answer's text as deltas of OpenAI's message: content, reasoning_content, tool_calls.

    ``style`` None: no tools were offered, and whatever looks like a call is text. Unless ``several`` calls
    are wanted, what follows a bare one is dropped; tags have an end, where the answer is stopped.
    """

    def __init__(self, style: Style | None, *, several: bool = True) -> None:
        self.calls = 0
        self._style = style
        self._several = several
        self._state = self._start
        self._text = ""
        self._value: _Value | None = None

    @property
    def is_thinking(self) -> bool:
        """Whether what comes now is the model's reasoning."""
        return self._state == self._thinking

    def push(self, text: str) -> list[dict[str, Any]]:
        """Take the next piece; return what is certain now."""
        self._text += text
        found: list[dict[str, Any]] = []
        while self._state(found):
            pass
        return found

    def finish(self) -> list[dict[str, Any]]:
        """No more text: return what was held back."""
        rest, self._text = self._text, ""
        if self.is_thinking:
            return _some("reasoning_content", rest)
        if self._state == self._calling:
            if self._value is not None:  # cut off in the middle: what there is has been sent
                return []
            call = self._whole(rest.removesuffix(CLOSE))
            return [call] if call else _some("content", (OPEN if self._style == "tags" else "") + rest)
        return [] if self.calls and not rest.strip() else _some("content", rest)

    def _start(self, found: list[dict[str, Any]]) -> bool:
        begun = self._text.lstrip()
        if _THINK.startswith(begun[: len(_THINK)]) and len(begun) <= len(_THINK):
            return False
        if begun.startswith(_THINK):
            self._text, self._state = begun.removeprefix(_THINK).removeprefix("\n"), self._thinking
        else:
            self._state = self._bare if self._style == "bare" else self._talking
        return True

    def _thinking(self, found: list[dict[str, Any]]) -> bool:
        thought, closed, rest = self._text.partition(_THOUGHT)
        if closed:
            found += _some("reasoning_content", thought)
            self._text, self._state = rest.lstrip("\n"), self._start
            return True
        self._say(found, "reasoning_content", open_length(self._text, (_THOUGHT,)))
        return False

    def _bare(self, found: list[dict[str, Any]]) -> bool:
        """A bare call can only be at the beginning, or after another one."""
        if self.calls and not self._several:
            self._text = ""
            return False
        begun = self._text.lstrip("; \n" if self.calls else None).removeprefix("<|python_tag|>")
        if not begun or (self._text.lstrip().startswith("<|") and not begun.startswith("{")):
            return False
        self._state = self._calling if begun.startswith("{") else self._talking
        self._text = begun if self._state == self._calling else self._text
        return True

    def _talking(self, found: list[dict[str, Any]]) -> bool:
        if self._style != "tags":
            self._say(found, "content", 0)
            return False
        said, opened, rest = self._text.partition(OPEN)
        if opened:
            found += _some("content", said.rstrip())
            self._text, self._state = rest, self._calling
            return True
        held = open_length(self._text, (OPEN,))
        body = self._text[: len(self._text) - held]
        self._say(found, "content", held + len(body) - len(body.rstrip()))  # spaces before a call go with it
        return False

    def _calling(self, found: list[dict[str, Any]]) -> bool:
        if self._value is None:
            head = _HEAD.match(self._text)
            if head is None:
                return self._odd(found)
            self._value = _Value(head.end())
            found.append(self._call(json.loads(f'"{head[1]}"', strict=False), ""))
        if new := self._value.look(self._text):
            found.append({"tool_calls": [{"index": self.calls - 1, "function": {"arguments": new}}]})
        if self._value.end is None:
            return False
        tail = _TAIL[self._style or "tags"].match(self._text, self._value.end)
        if tail is None:
            return False
        self._after(tail.end())
        return True

    def _odd(self, found: list[dict[str, Any]]) -> bool:
        """A call that does not begin as usual: wait for its end, and see."""
        at = self._text.find(CLOSE) if self._style == "tags" else -1
        if at < 0:
            return False
        call = self._whole(self._text[:at])
        found += [call] if call else _some("content", OPEN + self._text[: at + len(CLOSE)])
        self._after(at + len(CLOSE))
        return True

    def _after(self, end: int) -> None:
        self._text, self._value = self._text[end:], None
        self._state = self._bare if self._style == "bare" else self._talking

    def _whole(self, text: str) -> dict[str, Any] | None:
        try:
            told = json.loads(text)
            arguments = told["arguments"] if "arguments" in told else told["parameters"]
            name = told["name"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return self._call(name, json.dumps(arguments))

    def _call(self, name: str, arguments: str) -> dict[str, Any]:
        self.calls += 1
        function = {"name": name, "arguments": arguments}
        head = {"index": self.calls - 1, "id": new_id("call"), "type": "function"}
        return {"tool_calls": [{**head, "function": function}]}

    def _say(self, found: list[dict[str, Any]], name: str, held: int) -> None:
        """All but the last ``held`` characters."""
        end = len(self._text) - held
        found += _some(name, self._text[:end])
        self._text = self._text[end:]


def _some(name: str, text: str) -> list[dict[str, Any]]:
    return [{name: text}] if text else []


def message_of(deltas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole message that deltas make."""
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        for name in delta.keys() & {"content", "reasoning_content"}:
            message[name] = (message.get(name) or "") + delta[name]
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(calls):
                own = {name: part[name] for name in ("id", "type")}
                calls.append({**own, "function": dict(part["function"])})
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    if calls:
        return {**message, "tool_calls": calls}
    return {**message, "content": message["content"] or ""}
