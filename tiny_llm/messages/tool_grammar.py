"""Owns grammars of tool calls: what an answer must match that is to call one of some functions, or may."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tiny_llm.decoding.grammar import embedded_schema
from tiny_llm.messages.tool_parser import ARGS, CALLS, CLOSE, OPEN, ToolFormat

_ANY_ARGUMENTS = '{"type": "object", "x-guidance": {"lenient": true}}'


def calls_grammar(
    functions: Sequence[Mapping[str, Any]], tool_format: ToolFormat, *, several: bool, tags: Mapping[str, int]
) -> str:
    """A grammar, in Lark's notation, of answers that call one of ``functions``, or ``several``.

    ``tags``: those that are a token of their own, which llguidance must be told, and its id.
    """
    schemas = [embedded_schema(parameters_of(function)) for function in functions]
    return _lines([f"start: {_calls(tool_format, several)}", *_rules(functions, schemas, tool_format, tags)])


def strict_grammar(
    functions: Sequence[Mapping[str, Any]], tool_format: ToolFormat, *, several: bool, tags: Mapping[str, int]
) -> str | None:
    """A grammar of answers that say anything, but whose calls keep to the schemas of strict functions.

    It waits for a call's opening. None where that cannot be told from text: its tag is no token of its own.
    """
    schemas = [
        embedded_schema(parameters_of(function)) if function.get("strict") else _ANY_ARGUMENTS
        for function in functions
    ]
    calls = _calls(tool_format, several)
    rules = _rules(functions, schemas, tool_format, tags)
    if tool_format == "llama3_json":  # a bare call is all of an answer, and begins with its brace
        return _lines([f"start: {calls} | TEXT", r"TEXT: /([^{](.|\n)*)?/", *rules])
    tag = tags.get(OPEN if tool_format == "hermes" else CALLS)
    if tag is None:
        return None
    start = f"start: (other* {calls})* other*" if several else f"start: other* ({calls})?"
    return _lines([start, f"other: <[^{tag}]>", *rules])


def parameters_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments; one that names no parameters takes none."""
    given = function.get("parameters")
    if given is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **given}


def _calls(tool_format: ToolFormat, several: bool) -> str:
    """One call or more, as this format has them."""
    match tool_format:
        case "llama3_json":
            return 'call ("; " call)*' if several else "call"
        case "mistral":
            more = ' (", " call)*' if several else ""
            return f'opening " "? "[" call{more} "]"'
        case "mistral_args":
            return "call+" if several else "call"
        case _:
            return r'tagged ("\n" tagged)*' if several else "tagged"


def _rules(
    functions: Sequence[Mapping[str, Any]],
    schemas: Sequence[str],
    tool_format: ToolFormat,
    tags: Mapping[str, int],
) -> list[str]:
    """What a call is: of one of the functions, each with its schema."""

    def tag(text: str) -> str:
        return f"<[{tags[text]}]>" if text in tags else json.dumps(text)

    rules = [f"call: {' | '.join(f'f{number}' for number in range(len(functions)))}"]
    if tool_format in ("mistral", "mistral_args"):
        rules.append(f"opening: {tag(CALLS)}")
    if tool_format == "hermes":
        rules.append(rf'tagged: {tag(OPEN)} "\n" call "\n" {tag(CLOSE)}')
    key = "parameters" if tool_format == "llama3_json" else "arguments"
    for number, (function, schema) in enumerate(zip(functions, schemas, strict=True)):
        # A schema stays a document of its own, to which its references refer.
        name = json.dumps(function["name"])
        if tool_format == "mistral_args":
            rules.append(f"f{number}: opening {name} {tag(ARGS)} %json {schema}")
        else:
            head = f'{{"name": {name}, "{key}": '
            rules.append(f'f{number}: {json.dumps(head)} %json {schema} "}}"')
    return rules


def _lines(rules: Sequence[str]) -> str:
    return "".join(f"{rule}\n" for rule in rules)
