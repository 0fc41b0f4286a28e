"""Owns how past calls of tools are put before a chat template: the form that this template shows as they are.

Clients send a call's arguments as JSON in a string. Templates want that string or the object that it is,
content "" or none beside the calls, one call a message or many, ids of nine characters or any: a CallForm
says which. Knows no template; ``template_probe`` finds a template's form.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic_core import from_json

from tiny_llm.errors import RequestError

Message: TypeAlias = Mapping[str, Any]
_SHORT_ID = 9  # characters, as Mistral's templates demand


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template takes calls.

    ``as_text``: arguments as JSON in a string, not as an object. ``takes_text``: what is no object (cut short
    by a token limit) can be given as text; else as the object that it begins. ``content``: of a message that
    has calls alone. ``short_ids``: nine letters and digits. ``text_apart``: text beside calls is a message of
    its own. ``one_by_one``: each call is, followed by its results.
    """

    as_text: bool = False
    takes_text: bool = True
    content: str | None = ""
    short_ids: bool = False
    text_apart: bool = False
    one_by_one: bool = False


def has_calls(messages: Sequence[Message]) -> bool:
    """Whether there is a call or a tool's result among them: else their form does not matter."""
    return any(message.get("tool_calls") or message.get("role") == "tool" for message in messages)


def in_form(messages: Sequence[Message], form: CallForm) -> list[Message]:
    """``messages`` in OpenAI's words as a template of that form takes them.

    A tool's result that does not say whose it is gets the name of the call that has its id. Raises
    RequestError for a call that is none, or that this form cannot say.
    """
    messages = [_checked(message, number) for number, message in enumerate(messages)]
    if form.text_apart:
        messages = list(_with_text_apart(messages))
    if form.one_by_one:
        messages = list(_one_by_one(messages))
    names: dict[str, str] = {}  # of the calls so far, by their ids
    shown = []
    for message in messages:
        calls = message.get("tool_calls", ())
        names |= {call["id"]: call["function"]["name"] for call in calls if "id" in call}
        shown.append(_shown(message, form, names))
    return shown


def _checked(message: Message, number: int) -> Message:
    """A message whose calls, if any, have a function each."""
    given = message.get("tool_calls")
    checked = {name: value for name, value in message.items() if name != "tool_calls"}
    if not given:
        return {**checked, "content": "" if message.get("content") is None else message["content"]}
    calls = []
    for place, call in enumerate(given):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            expected = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
            what = f"messages[{number}].tool_calls[{place}] is {call!r:.200}, but must be like {expected}."
            raise RequestError(what, param="messages", code="invalid_value")
        head = {"id": call["id"]} if "id" in call else {}
        function = {"name": function["name"], "arguments": function.get("arguments")}
        calls.append({**head, "type": call.get("type", "function"), "function": function})
    return {**checked, "tool_calls": calls}


def _with_text_apart(messages: Sequence[Message]) -> Iterator[Message]:
    """Text beside calls as a message before them."""
    for message in messages:
        if message.get("tool_calls") and message.get("content"):
            yield {name: value for name, value in message.items() if name != "tool_calls"}
            yield {"role": message["role"], "content": "", "tool_calls": message["tool_calls"]}
        else:
            yield message


def _one_by_one(messages: Sequence[Message]) -> Iterator[Message]:
    """Each call as a message, followed by its results."""
    following = 0
    for number, message in enumerate(messages):
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            if number >= following:
                yield message
            continue
        following = number + 1
        while following < len(messages) and messages[following].get("role") == "tool":
            following += 1
        results = list(messages[number + 1 : following])
        for place, call in enumerate(calls):
            alone = {"role": message["role"], "content": ""} if place else message
            yield {**alone, "tool_calls": [call]}
            own = [one for one in results if one.get("tool_call_id") == call.get("id")]
            yield from own
            results = [one for one in results if one not in own]
        yield from results


def _shown(message: Message, form: CallForm, names: Mapping[str, str]) -> Message:
    """One message in that form; ``names`` are of the calls before it."""
    if calls := message.get("tool_calls"):
        shown_calls = [_shown_call(call, form) for call in calls]
        return {**message, "content": message.get("content") or form.content, "tool_calls": shown_calls}
    call_id = message.get("tool_call_id")
    if message.get("role") != "tool" or not isinstance(call_id, str):
        return message
    named = {"name": names[call_id]} if call_id in names else {}
    return {**named, **message, "tool_call_id": short_id(call_id) if form.short_ids else call_id}


def _shown_call(call: Message, form: CallForm) -> Message:
    function = call["function"]
    arguments = _shown_arguments(function["arguments"], form, function["name"])
    shown = {**call, "function": {"name": function["name"], "arguments": arguments}}
    if form.short_ids and isinstance(call.get("id"), str):
        shown["id"] = short_id(call["id"])
    return shown


def _shown_arguments(given: object, form: CallForm, name: str) -> object:
    value = _object(given)
    if value is None and isinstance(given, str):
        if form.takes_text:
            return given
        value = _begun(given)
    if value is None:
        what = f"The arguments of a call of {name!r} are {given!r:.200}, but must be a JSON object."
        raise RequestError(what, param="messages", code="invalid_value")
    if not form.as_text:
        return value
    is_written = isinstance(given, str) and given.lstrip().startswith("{")
    return given if is_written else json.dumps(value, ensure_ascii=False)


def _object(given: object) -> Mapping[str, Any] | None:
    """The object that arguments are; none at all are {}. None for what is no object, or not finite."""
    if given is None or (isinstance(given, str) and given.strip() in ("", "null")):
        return {}
    if isinstance(given, Mapping):
        return given
    if not isinstance(given, str):
        return None
    try:
        value = from_json(given, allow_inf_nan=False)
        json.dumps(value, allow_nan=False)  # 1e999 was read as infinity
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _begun(text: str) -> Mapping[str, Any] | None:
    """The object that a text begins, closed where it was cut; None where it begins none."""
    try:
        value = from_json(text, allow_inf_nan=False, allow_partial="trailing-strings")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def short_id(call_id: str) -> str:
    """A call's id of nine letters and digits, always the same for the same one."""
    if len(call_id) == _SHORT_ID and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:_SHORT_ID]
