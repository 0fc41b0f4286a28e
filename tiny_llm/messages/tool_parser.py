"""Owns tool calls in a model's text: told from what it says, as it streams.

Four formats: Qwen2.5's and Hermes' ``<tool_call>`` tags around {"name", "arguments"}, LLaMA 3's bare
{"name", "parameters"}, Mistral's ``[TOOL_CALLS]`` before a list of the former, and Mistral's newer one,
``[TOOL_CALLS]name[ARGS]{...}`` for each call. What is certain is given out; a call never shows as text, and
what turns out to be no call does. Knows no reasoning.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Literal, TypeAlias

from tiny_llm.data import MessageDelta, ToolCallDelta
from tiny_llm.decoding.stop import open_length

ToolFormat = Literal["hermes", "llama3_json", "mistral", "mistral_args"]
OPEN, CLOSE = "<tool_call>", "</tool_call>"
CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_TAGS: Mapping[ToolFormat, str] = {"hermes": OPEN, "mistral": CALLS, "mistral_args": CALLS}
_PYTHON_TAG = "<|python_tag|>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""A call up to its arguments, as models nearly always write it: these can be streamed."""
_NAMED_HEAD = re.compile(r"\s*([^\s\[{]+)\s*(?:\[CALL_ID\][^\[{]*)?\[ARGS\]\s*(?=\{)")
_LONGEST_HEAD = 256  # characters: of a name, an id and the tags between them
_State: TypeAlias = Callable[[list[MessageDelta]], bool]


def tool_format_of(template: str) -> ToolFormat:
    """How a model with this chat template writes its calls."""
    if OPEN not in template and CALLS in template:
        return "mistral_args" if ARGS in template else "mistral"
    return "llama3_json" if OPEN not in template and '"parameters"' in template else "hermes"


class ToolParser:
    """One answer's text, in any pieces, to content and calls of functions that have one of ``names``.

    Unless ``parallel`` calls are wanted, what follows the first one is dropped. ``calls`` counts those that
    have begun.
    """

    def __init__(self, tool_format: ToolFormat, names: Collection[str], *, parallel: bool = True) -> None:
        self.calls = 0
        self._format = tool_format
        self._names = frozenset(names)
        self._parallel = parallel
        self._advance: _State = self._between if tool_format == "llama3_json" else self._talking
        self._text = ""
        self._lead = ""  # what opened a call: text, if it turns out to be none
        self._arguments: _JsonObject | None = None
        self._object: _JsonObject | None = None  # the call around them

    @property
    def is_over(self) -> bool:
        """Whether the only call that is wanted has been made."""
        return self._advance == self._dropping

    def push(self, text: str) -> list[MessageDelta]:
        """Take the next piece; return what is certain now."""
        self._text += text
        found: list[MessageDelta] = []
        while self._advance(found):
            pass
        return found

    def finish(self) -> list[MessageDelta]:
        """No more text: return what was held back."""
        found: list[MessageDelta] = []
        while self._give_up(found):
            found += self.push("")
        rest, self._text = self._text, ""
        is_text = self._advance in (self._talking, self._between)
        if is_text and not (self.calls and not rest.strip()):
            found += _content(rest)
        return found  # of a call that was cut off, what there is has been sent

    def _give_up(self, found: list[MessageDelta]) -> bool:
        """A call's end will not come any more: read on behind what opened it, or behind its closing tag."""
        if self._advance in (self._opened, self._calling, self._naming) and self._arguments is None:
            return self._no_call(found)
        if self._advance == self._ending and CLOSE in self._text:
            self._leave(self._text.index(CLOSE), self._ended)
            return True
        return False

    # The states. Each takes what it can of the text, and says whether another one goes on with the rest.

    def _between(self, found: list[MessageDelta]) -> bool:
        """A bare call can only be at the beginning, or after another one."""
        begun = self._text.lstrip("; \n") if self.calls else self._text.lstrip()
        call = begun.removeprefix(_PYTHON_TAG)
        if not call or _PYTHON_TAG.startswith(begun):
            return False
        if call.startswith("{"):
            self._open(len(self._text) - len(call), self._calling)
        else:
            self._advance = self._talking
        return True

    def _talking(self, found: list[MessageDelta]) -> bool:
        tag = _TAGS.get(self._format)
        if tag is None:
            self._say(found, len(self._text))
            return False
        at = self._text.find(tag)
        if at >= 0:
            self._say(found, len(self._text[:at].rstrip()))  # spaces before a call go with it
            end = self._text.index(tag) + len(tag)
            self._open(end, self._calling if self._format == "hermes" else self._opened)
            return True
        certain = self._text[: len(self._text) - open_length(self._text, (tag,))]
        self._say(found, len(certain.rstrip()))
        return False

    def _opened(self, found: list[MessageDelta]) -> bool:
        """After the tag of a list of calls, the list; or the name of one."""
        begun = self._text.lstrip()
        if not begun:
            return False
        if begun.startswith("["):
            self._open(len(self._text) - len(begun) + 1, self._calling)
        else:
            self._advance = self._naming
        return True

    def _naming(self, found: list[MessageDelta]) -> bool:
        """A name, perhaps the call's id, and its arguments."""
        if self._arguments is None:
            head = _NAMED_HEAD.match(self._text)
            if head is None:
                return not self._may_be_named() and self._no_call(found)
            if head[1] not in self._names:
                return self._no_call(found)
            self._arguments = _JsonObject(head.end())
            found.append(self._call(head[1], ""))
        return self._tell_arguments(found, self._talking if self._parallel else self._dropping)

    def _may_be_named(self) -> bool:
        """Whether more text can still make the head of a call of what is there."""
        begun = self._text.lstrip()
        name, bracket, rest = begun.partition("[")
        if not bracket:
            words = name.split()
            whole = len(words) == 1 and words[0] in self._names
            return not words or whole or any(own.startswith(name) for own in self._names)
        told, closed, arguments = (bracket + rest).partition(ARGS)
        if closed:
            return not arguments.strip()
        is_tag = any(tag.startswith(told) or told.startswith(CALL_ID) for tag in (ARGS, CALL_ID))
        return name.strip() in self._names and is_tag and len(begun) < _LONGEST_HEAD

    def _calling(self, found: list[MessageDelta]) -> bool:
        if self._arguments is None:
            if not "{".startswith(self._text.lstrip()[:1]):
                return self._no_call(found)
            head = _HEAD.match(self._text)
            if head is None:
                return self._unusual(found)
            name = _string(head[1])
            if name is None or name not in self._names:
                return self._no_call(found)
            self._arguments = _JsonObject(head.end())
            found.append(self._call(name, ""))
        return self._tell_arguments(found, self._ending)

    def _tell_arguments(self, found: list[MessageDelta], then: _State) -> bool:
        """What is new of a call's arguments; at their end, ``then``."""
        assert self._arguments is not None, "a call has begun"
        new = self._arguments.look(self._text)
        if new:
            found.append(MessageDelta(tool_call=ToolCallDelta(self.calls - 1, new)))
        if self._arguments.end is None:
            return False
        self._leave(self._arguments.end, then)
        return True

    def _unusual(self, found: list[MessageDelta]) -> bool:
        """A call that does not begin as usual: wait for its end, and see."""
        if "{" not in self._text:
            return False
        self._object = self._object or _JsonObject(self._text.index("{"))
        self._object.look(self._text)
        if self._object.end is None:
            return False
        call = self._whole(self._text[: self._object.end])
        if call is None:
            return self._no_call(found)
        found.append(call)
        self._leave(self._object.end, self._ended)
        return True

    def _ending(self, found: list[MessageDelta]) -> bool:
        """What a call has after its arguments: its brace, or more keys, which are nothing to us."""
        rest = self._text.lstrip()
        if not rest:
            return False
        if rest[0] not in ",}":  # it has no brace
            self._advance = self._ended
            return True
        self._object = self._object or _JsonObject(0, depth=1)
        self._object.look(self._text)
        if self._object.end is None:
            return False
        self._leave(self._object.end, self._ended)
        return True

    def _ended(self, found: list[MessageDelta]) -> bool:
        """After a call, its closing tag, or what stands between it and the next one of a list."""
        rest = self._text.lstrip()
        if not self._parallel:
            self._advance = self._dropping
        elif self._format == "llama3_json":
            self._advance = self._between
        elif self._format == "hermes":
            if rest != CLOSE and CLOSE.startswith(rest):
                return False
            self._text = rest.removeprefix(CLOSE) if rest.startswith(CLOSE) else self._text
            self._advance = self._talking
        elif not rest:
            return False
        elif rest[0] == ",":
            self._open(self._text.index(",") + 1, self._calling)
        else:
            self._text = rest[1:] if rest[0] == "]" else self._text
            self._advance = self._talking
        return True

    def _dropping(self, found: list[MessageDelta]) -> bool:
        """The only call that is wanted has been made."""
        self._text = ""
        return False

    def _open(self, end: int, state: _State) -> None:
        """A call may begin there."""
        self._lead += self._text[:end]
        self._leave(end, state)

    def _leave(self, end: int, state: _State) -> None:
        """The text up to there has been read; what follows is of another kind."""
        self._text, self._advance = self._text[end:], state
        self._arguments = self._object = None

    def _no_call(self, found: list[MessageDelta]) -> bool:
        """What was opened is none."""
        found += _content(self._lead)
        self._lead = ""
        self._leave(0, self._talking)
        return True

    def _whole(self, text: str) -> MessageDelta | None:
        """The call that a text is, None if it is none."""
        try:
            told = json.loads(text)
            arguments = told["arguments"] if "arguments" in told else told["parameters"]
            name = told["name"]
            if name not in self._names or not isinstance(arguments, dict):
                return None
            return self._call(name, json.dumps(arguments))
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def _call(self, name: str, arguments: str) -> MessageDelta:
        self._lead = ""
        index, self.calls = self.calls, self.calls + 1
        call_id = f"call-{secrets.token_hex(16)}"  # nobody can guess another conversation's
        return MessageDelta(tool_call=ToolCallDelta(index, arguments, call_id, name))

    def _say(self, found: list[MessageDelta], end: int) -> None:
        """The text up to there is content."""
        found += _content(self._text[:end])
        self._text = self._text[end:]


class _JsonObject:
    """Finds the end of a JSON object that comes in pieces; looks at each character once.

    ``depth``: how many braces were open before ``start``.
    """

    def __init__(self, start: int, depth: int = 0) -> None:
        self.end: int | None = None
        self._at = start
        self._depth = depth
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


def _string(written: str) -> str | None:
    """What a JSON string says, given without its quotes; None where it is none."""
    try:
        return str(json.loads(f'"{written}"', strict=False))
    except ValueError:
        return None


def _content(text: str) -> list[MessageDelta]:
    return [MessageDelta(content=text)] if text else []
