"""Owns what a chat template shows, found by rendering samples: in which form calls, and what it leaves out.

A sample says words that occur nowhere else; what a template shows has them. Knows no template by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple, TypeAlias

from tiny_llm.errors import RequestError
from tiny_llm.messages.call_form import CallForm, Message, in_form

Render: TypeAlias = Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None], str]
"""Messages and tools to a prompt; RequestError where the template refuses them."""


def _word(*place: object) -> str:
    """A word that no template has, of its own for each ``place``."""
    return "zq" + "kv".join(map(str, place)) + "qz"


SAMPLE_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": _word("tool"),
        "description": "A sample.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}},
    },
}


class Shape(NamedTuple):
    """What of a message may decide whether a template shows it; ``answers`` is the call's number, of all."""

    role: str
    has_content: bool = True
    calls: int = 0
    answers: int | None = None
    is_reasoned: bool = False


class Lost(NamedTuple):
    """What a template leaves out: a message's "content" or "tool_calls", or the tools (``message`` None)."""

    message: int | None
    field: str


def shapes_of(messages: Sequence[Message]) -> tuple[Shape, ...]:
    """The messages' shapes; a content that is not text counts as none."""
    numbers: dict[object, int] = {}  # of calls, by their ids
    shapes, count = [], 0
    for message in messages:
        calls = message.get("tool_calls") or ()
        for call in calls:
            numbers[call.get("id")] = count
            count += 1
        content = message.get("content")
        shapes.append(
            Shape(
                role=str(message.get("role")),
                has_content=isinstance(content, str) and bool(content.strip()),
                calls=len(calls),
                answers=numbers.get(message.get("tool_call_id")),
                is_reasoned=bool(message.get("reasoning_content")),
            )
        )
    return tuple(shapes)


def lost_parts(render: Render, form: CallForm, shapes: Sequence[Shape], *, has_tools: bool) -> list[Lost]:
    """What a template does not show of a conversation with these shapes. Of reasoning nothing is expected.

    A system message needs not be shown once the tools have answered (Mistral's stands in the last message of
    the user, if that is the last at all): it is looked for in the conversation up to there.
    """
    tools = [SAMPLE_TOOL] if has_tools else None
    text = _rendered(render, form, _sample(shapes), tools)
    if text is None:  # and the conversation itself could be rendered: nothing is known
        return []
    lost = list(_missing(text, shapes, has_tools=has_tools))
    is_system = [part.message is not None and shapes[part.message].role == "system" for part in lost]
    asked = max((number for number, shape in enumerate(shapes) if shape.role == "user"), default=-1) + 1
    if any(is_system) and 0 < asked < len(shapes):
        before = lost_parts(render, form, shapes[:asked], has_tools=has_tools)
        lost = [part for part, system in zip(lost, is_system, strict=True) if not system or part in before]
    return lost


def form_of(render: Render) -> CallForm:
    """The form in which a template shows calls: as JSON objects, or at least all that they say.

    Where several do, that with the fewest characters: "None" or an empty message is not shown beside them.
    """
    forms = [
        CallForm(as_text, content=content, short_ids=short)
        for short, as_text, content in product((False, True), (False, True), ("", None))
    ]
    best = max(forms, key=lambda form: _worth(render, form))
    if not _shows_all(render, best, _CALL):
        return best
    best = replace(best, takes_text=_takes_text(render, best))
    best = _mended(render, best, _TEXT_AND_CALL, text_apart=True)
    return _mended(render, best, _TWO_CALLS, one_by_one=True)


_USER, _ANSWER = Shape("user"), Shape("assistant")
_CALL = (_USER, Shape("assistant", False, 1), Shape("tool", answers=0))
_TEXT_AND_CALL = (_USER, Shape("assistant", True, 1), Shape("tool", answers=0), _ANSWER, _USER)
_RESULTS = (Shape("tool", answers=0), Shape("tool", answers=1))
_TWO_CALLS = (_USER, Shape("assistant", False, 2), *_RESULTS, _ANSWER, _USER)


def _sample(shapes: Sequence[Shape]) -> list[Message]:
    """A conversation of those shapes, each of its texts a word of its own."""
    messages: list[Message] = []
    count = 0
    for number, shape in enumerate(shapes):
        message: dict[str, Any] = {
            "role": shape.role,
            "content": _word(number, "content") if shape.has_content else "",
        }
        if shape.calls:
            message["tool_calls"] = [_sample_call(number, call, count + call) for call in range(shape.calls)]
            count += shape.calls
        if shape.answers is not None:
            message["tool_call_id"] = f"sample-call-{shape.answers}"
        if shape.is_reasoned:
            message["reasoning_content"] = "So."
        messages.append(message)
    return messages


def _sample_call(message: int, call: int, number: int) -> Message:
    arguments = json.dumps({_word(message, call, "key"): _word(message, call, "value")})
    function = {"name": _word(message, call, "name"), "arguments": arguments}
    return {"id": f"sample-call-{number}", "type": "function", "function": function}


def _missing(text: str, shapes: Sequence[Shape], *, has_tools: bool) -> Iterator[Lost]:
    """What of a sample is not in ``text``."""
    if has_tools and _word("tool") not in text:
        yield Lost(None, "tools")
    for number, shape in enumerate(shapes):
        if shape.has_content and _word(number, "content") not in text:
            yield Lost(number, "content")
        parts = [(call, part) for call in range(shape.calls) for part in ("name", "key", "value")]
        if any(_word(number, call, part) not in text for call, part in parts):
            yield Lost(number, "tool_calls")


def _rendered(
    render: Render, form: CallForm, sample: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> str | None:
    """A sample's prompt, None where the template refuses it."""
    try:
        return render(in_form(sample, form), tools)
    except RequestError:
        return None


def _mended(render: Render, form: CallForm, shapes: Sequence[Shape], **change: Any) -> CallForm:
    """The form with a change, if conversations of those shapes are shown whole with it alone."""
    changed = replace(form, **change)
    is_better = not _shows_all(render, form, shapes) and _shows_all(render, changed, shapes)
    return changed if is_better else form


def _shows_all(render: Render, form: CallForm, shapes: Sequence[Shape]) -> bool:
    text = _rendered(render, form, _sample(shapes), [SAMPLE_TOOL])
    return text is not None and not any(_missing(text, shapes, has_tools=False))


def _worth(render: Render, form: CallForm) -> tuple[bool, bool, bool, int]:
    """How a form shows a sample call: all of it, as a JSON object, with its id as it is, and nothing else."""
    sample = _sample(_CALL)
    text = _rendered(render, form, sample, [SAMPLE_TOOL])
    if text is None or any(_missing(text, _CALL, has_tools=False)):
        return False, False, False, 0
    arguments = json.loads(sample[1]["tool_calls"][0]["function"]["arguments"])
    return True, _has_object(text, arguments), not form.short_ids, -len(text)


def _has_object(text: str, value: object) -> bool:
    """Whether a text shows an object as JSON, however spaced, once and not within a string."""
    decoder, shown = json.JSONDecoder(), 0
    for at, char in enumerate(text):
        if char == "{":
            try:
                shown += decoder.raw_decode(text, at)[0] == value
            except ValueError:
                continue
    return shown == 1


def _takes_text(render: Render, form: CallForm) -> bool:
    """Whether arguments that are no object are shown: as they are, or as a JSON string."""
    sample = _sample(_CALL)
    cut = f'{{"{_word("cut")}": "'
    sample[1]["tool_calls"][0]["function"]["arguments"] = cut
    text = _rendered(render, form, sample, [SAMPLE_TOOL])
    return text is not None and (cut in text or json.dumps(cut) in text)
