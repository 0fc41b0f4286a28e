"""Owns grammars of tool calls: what an answer must match that is to call one of some functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tiny_llm.decoding.grammar import embedded_schema
from tiny_llm.decoding.tool_parser import CALLS, CLOSE, OPEN, ToolFormat


def calls_grammar(
    functions: Sequence[Mapping[str, Any]], tool_format: ToolFormat, *, several: bool, tags: Mapping[str, int]
) -> str:
    """A grammar, in Lark's notation, of answers that call one of ``functions``, or ``several``.

    ``tags``: those that are a token of their own, which llguidance must be told, and its id.
    """
    rules = [f"call: {' | '.join(f'f{number}' for number in range(len(functions)))}"]
    rules += [_call_rule(number, function, tool_format) for number, function in enumerate(functions)]
    between, opening, closing = _around(tool_format, tags)
    more = f" ({between} call)*" if several else ""
    if tool_format == "hermes":
        more = f" ({between} tagged)*" if several else ""
        rules = [f"start: tagged{more}", f"tagged: {opening} call {closing}", *rules]
    else:
        rules = [f"start: {opening} call{more} {closing}", *rules]
    return "\n".join(rules) + "\n"


def _around(tool_format: ToolFormat, tags: Mapping[str, int]) -> tuple[str, str, str]:
    """What stands between calls, and before and after each one, or all of a list."""

    def tag(text: str) -> str:
        return f"<[{tags[text]}]>" if text in tags else json.dumps(text)

    match tool_format:
        case "llama3_json":
            return '"; "', "", ""
        case "mistral":
            return '", "', f'{tag(CALLS)} " "? "["', '"]"'
        case _:
            return '"\\n"', f'{tag(OPEN)} "\\n"', f'"\\n" {tag(CLOSE)}'


def _call_rule(number: int, function: Mapping[str, Any], tool_format: ToolFormat) -> str:
    """A call of one function. Its schema stays a document of its own, to which its references refer."""
    key = "parameters" if tool_format == "llama3_json" else "arguments"
    head = f'{{"name": {json.dumps(function["name"])}, "{key}": '
    parameters = embedded_schema(parameters_of(function))
    return f'f{number}: {json.dumps(head)} %json {parameters} "}}"'


def parameters_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments; one that names no parameters takes none."""
    given = function.get("parameters")
    if given is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **given}
