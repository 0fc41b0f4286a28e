"""Owns the prompt of a conversation: what was said as the model's chat template shows it, and all of it.

What the template would leave out is refused: tools that it does not know, calls, results, a system message.
Knows no HTTP; what is wrong is a RequestError that names the field.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tiny_llm.errors import RequestError
from tiny_llm.messages.call_form import CallForm, Message, has_calls, in_form
from tiny_llm.messages.template_probe import Lost, Shape, form_of, lost_parts, shapes_of
from tiny_llm.tokenizer.tokenizer import Tokenizer

Tools = Sequence[Mapping[str, Any]]
PLACE = "\ue000contexts\ue001"
"""Where texts that are kept elsewhere are to stand in a prompt: a mark of characters that nobody writes."""
_SHAPES = 256  # conversations of different shapes, of which is remembered what the template shows
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


class ChatPrompts:
    """One tokenizer's prompts. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._form = functools.lru_cache(_SHAPES)(self._find_form)
        self._lost = functools.lru_cache(_SHAPES)(self._find_lost)

    def text(self, messages: Sequence[Message], *, tools: Tools | None = None, **variables: object) -> str:
        """The prompt. Encode it without special tokens. ``variables`` are the template's own: JSON values.

        Raises ConfigError if there is no usable template; RequestError if it refuses the conversation or
        does not show it whole.
        """
        form = self._form(bool(tools)) if has_calls(messages) else CallForm()
        text = self._rendered(in_form(messages, form), tools, variables)
        shapes = shapes_of(messages)
        lost = self._lost(form, shapes, bool(tools), json.dumps(variables))
        if lost:
            raise _not_shown(lost[0], shapes)
        return text

    def _rendered(
        self, messages: Sequence[Message], tools: Tools | None, variables: Mapping[str, Any]
    ) -> str:
        """The prompt; a tool has a description and parameters where the template cannot do without."""
        render = functools.partial(self._tokenizer.render_chat, messages, **variables)
        if not tools:
            return render()
        try:
            return render(tools=tools)
        except RequestError as error:
            refused = error
        try:
            return render(tools=[_completed(tool) for tool in tools])
        except RequestError:
            render()  # raises what is wrong with the messages
        raise RequestError(f"tools: {refused}", param="tools", code="invalid_value") from refused

    def _find_form(self, has_tools: bool) -> CallForm:
        """The form of the template that is taken with tools, or without."""
        return form_of(
            lambda messages, tools: self._tokenizer.render_chat(messages, tools=tools if has_tools else None)
        )

    def _find_lost(
        self, form: CallForm, shapes: tuple[Shape, ...], has_tools: bool, variables: str
    ) -> list[Lost]:
        given = json.loads(variables)
        return lost_parts(
            lambda messages, tools: self._tokenizer.render_chat(messages, tools=tools, **given),
            form,
            shapes,
            has_tools=has_tools,
        )


def with_place(messages: Sequence[Message]) -> list[Message]:
    """A conversation whose system message begins with ``PLACE``; it gets one if it has none."""
    first, *others = messages or [{}]
    if first.get("role") != "system":
        return [{"role": "system", "content": PLACE}, *messages]
    return [{**first, "content": f"{PLACE}{first.get('content', '')}"}, *others]


def _completed(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool with all that OpenAI lets be left out."""
    function = {"description": "", "parameters": _NO_PARAMETERS, **tool["function"]}
    return {**tool, "function": function}


def _not_shown(part: Lost, shapes: Sequence[Shape]) -> RequestError:
    """What is wrong with a conversation of which the template does not show a part."""
    if part.message is None:
        what = (
            "tools: this model's chat template shows none, so the model would not know of them. "
            "Leave them out, or use a model that was trained to call tools."
        )
        return RequestError(what, param="tools", code="unsupported")
    shape = shapes[part.message]
    where = f"messages[{part.message}].{part.field}"
    if part.field == "content" and shape.calls:
        what = "shows no text beside calls. Send the calls alone."
    elif part.field == "content" and shape.role == "system":
        what = "does not show it. Put it into the user's message."
    else:
        what = f"does not show it (role {shape.role!r}). Leave it out, or use a model that takes it."
    return RequestError(f"{where}: this model's chat template {what}", param="messages", code="unsupported")
