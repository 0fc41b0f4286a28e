"""Owns grammars of tool calls: what an answer must match that is to call one of some functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tiny_llm.decoding.tool_parser import CLOSE, OPEN, ToolFormat


def calls_grammar(
    functions: Sequence[Mapping[str, Any]], tool_format: ToolFormat, *, several: bool, tag_tokens: bool
) -> str:
    """A grammar, in Lark's notation, of answers that call one of ``functions``, or ``several``.

    ``tag_tokens``: the tags are tokens of their own, which llguidance must be told.
    """
    key = "arguments" if tool_format == "hermes" else "parameters"
    options = [_call_schema(function, key) for function in functions]
    spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    call = json.dumps({"anyOf": options, "x-guidance": spaces})
    if tool_format == "llama3_json":
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
