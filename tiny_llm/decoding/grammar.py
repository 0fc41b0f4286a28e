"""Owns what an answer can be asked to match: a JSON schema that a value can satisfy which ends, a regular
expression, a grammar.

Each becomes a grammar in llguidance's own notation. Compiling it, and keeping an answer to it, is
structured_output.py's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote

from llguidance import LLMatcher, LLParserLimits

from tiny_llm.errors import RequestError

THINK, THOUGHT = "<think>", "</think>"  # what a thought stands between, at an answer's beginning
MAX_GRAMMAR_BYTES = 2**17  # of a schema, a regular expression or a grammar, as it was given
_JSON_OPTIONS: Mapping[str, object] = {
    # Of all the ways to write a value, the one that models have read most; no room for endless spaces.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,  # what it does not know it refuses, and names
    "coerce_one_of": False,
}

_COUNTS = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"})
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_DATA = frozenset({"const", "enum", "default", "examples", "x-guidance"})
"""Keywords whose values are data, in which nothing is a keyword."""

_NO_FAULTS = ("WARNING", "regex", "Resource", "limit", "too large", "fuel")
"""In what llguidance says of legal schemas: what it does not know, reach or hold."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must match, in llguidance's notation; ``param`` is the argument that asked for it.

    ``thought``: the answer "may" begin with a thought, or does, as the prompt "opened" one; it is matched
    behind that. None: from its first token on.
    """

    text: str
    param: str
    thought: Literal["may", "opened"] | None = None


def behind_thought(grammar: Grammar, marks: Mapping[str, int], end_ids: Collection[int]) -> str:
    """``grammar`` behind its thought, in llguidance's notation: in a thought, all may be said but its end.

    ``marks``: added tokens that are no text, and their ids; no token of ``end_ids`` ends a thought.
    """
    opening = f"<[{marks[THINK]}]>" if THINK in marks else json.dumps(THINK)
    start = "body GAP @form" if grammar.thought == "opened" else f"({opening} body GAP)? @form"
    rules = [f"start: {start}", r"GAP: /\n{0,2}/"]
    if THOUGHT in marks:
        banned = ",".join(map(str, sorted({marks[THOUGHT], *end_ids})))
        rules += [f"body: other* <[{marks[THOUGHT]}]>", f"other: <[^{banned}]>"]
    else:
        said = ",".join(map(str, sorted({*marks.values()} - {*end_ids})))
        rules += [f"body: {f'(TEXT <[{said}]>)*' if said else ''} last", "TEXT: /(?s:.*)/"]
        rules.append(f"last[suffix={json.dumps(THOUGHT)}]: /(?s:.*)/")
    text = grammar.text
    form = json.loads(text)["grammars"] if text.lstrip().startswith("{") else [{"lark_grammar": text}]
    parts = [{"lark_grammar": "\n".join(rules)}, {**form[0], "name": "form"}, *form[1:]]
    return json.dumps({"grammars": parts})


def schema_grammar(schema: Mapping[str, object], param: str = "response_format") -> Grammar:
    """JSON values that are valid against ``schema``. Its own wishes on llguidance's options are dropped.

    Raises RequestError for a schema that is too large or has a keyword that cannot be kept.
    """
    text = embedded_schema(schema, param)
    _require_small(text, param)
    try:
        return Grammar(str(LLMatcher.grammar_from_json_schema(text)), param)
    except ValueError as error:
        raise RequestError(f"{param}: {error}", param=param, code="invalid_schema") from error


def require_schema(schema: Mapping[str, object], param: str) -> None:
    """Raise RequestError for what is no JSON schema, as {"type": 123}, or refers to what is not there.

    What llguidance cannot keep is no fault here.
    """
    text = embedded_schema(schema, param)
    _require_small(text, param)
    options: Any = {"lenient": True}  # llguidance names their type in its stubs alone
    grammar = LLMatcher.grammar_from_json_schema(text, overrides=options)
    told = LLMatcher.validate_grammar(str(grammar), limits=LLParserLimits(verbose_errors=False))
    if told and not any(word in told for word in _NO_FAULTS):
        what = f"{param}: {told.partition(chr(10))[0]}"
        raise RequestError(what, param=param, code="invalid_schema")


def embedded_schema(schema: Mapping[str, object], param: str = "tools") -> str:
    """``schema`` as a grammar in Lark's notation has it, after ``%json``. Raises RequestError."""
    own = {**schema, "x-guidance": _JSON_OPTIONS}
    try:
        text = json.dumps(_with_whole_counts(own), ensure_ascii=False, allow_nan=False)
        if has_finite_value(schema):
            return text
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{param} is no JSON: {error}.", param=param, code="invalid_schema") from error
    what = f"{param}: no finite answer satisfies a schema that requires itself; make its $ref optional."
    raise RequestError(what, param=param, code="invalid_schema")


def _with_whole_counts(schema: Any) -> Any:
    """The same schema, its counts written as llguidance takes them: 2.0 is a whole number to JSON schema."""
    if isinstance(schema, list):
        return [_with_whole_counts(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    whole: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _COUNTS and isinstance(value, float) and value.is_integer():
            whole[name] = int(value)
        elif name in _NAMED_SCHEMAS and isinstance(value, Mapping):
            whole[name] = {key: _with_whole_counts(one) for key, one in value.items()}
        else:
            whole[name] = value if name in _DATA else _with_whole_counts(value)
    return whole


def regex_grammar(pattern: str, param: str = "regex") -> Grammar:
    """Texts that ``pattern`` matches whole. Raises RequestError for one that is too large."""
    _require_small(pattern, param)
    return Grammar(str(LLMatcher.grammar_from_regex(pattern)), param)


def lark_grammar(grammar: str, param: str = "grammar") -> Grammar:
    """Texts that a grammar in Lark's notation makes, from its rule ``start``.

    Raises RequestError for one that is too large.
    """
    _require_small(grammar, param)
    return Grammar(str(LLMatcher.grammar_from_lark(grammar)), param)


def response_grammar(response_format: Mapping[str, object] | None) -> Grammar | None:
    """OpenAI's ``response_format``: None where the answer may be anything.

    Raises RequestError for a type other than "text", "json_object" and "json_schema", and for the latter
    without {"json_schema": {"schema": {...}}}.
    """
    if response_format is None:
        return None
    match response_format:
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return schema_grammar({"type": "object"})
        case {"type": "json_schema", "json_schema": {"schema": Mapping() as schema}}:
            return schema_grammar(schema)
        case {"type": "json_schema", "json_schema": {**rest}} if "schema" not in rest:
            return schema_grammar({})
        case {"type": "json_schema"}:
            what = "response_format.json_schema is missing, or its schema is no object."
            raise RequestError(what, param="response_format.json_schema", code="missing")
        case _:
            expected = (
                '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": ...}'
            )
            what = f"response_format is {response_format!r}, but must be {expected}."
            raise RequestError(what, param="response_format", code="invalid_value")


def _require_small(text: str, param: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        what = f"{param} has half of a surrogate pair, which is no character: {error}."
        raise RequestError(what, param=param, code="invalid_value") from error
    if size > MAX_GRAMMAR_BYTES:
        what = f"{param} has {size} bytes, but may have at most {MAX_GRAMMAR_BYTES}."
        raise RequestError(what, param=param, code="too_complex")


def has_finite_value(schema: Mapping[str, Any]) -> bool:
    """Whether a finite value may satisfy ``schema``, as far as its references alone can forbid it.

    A reference is finite once its target is, given the references known to be so: the least fixed point.
    """
    pending = {ref: _target(schema, ref) for ref in _references(schema)}
    finite: set[str] = set()
    while found := {ref for ref, target in pending.items() if _is_finite(target, finite)}:
        finite |= found
        pending = {ref: target for ref, target in pending.items() if ref not in found}
    return _is_finite(schema, finite)


def _is_finite(schema: Any, finite: Collection[str]) -> bool:
    if not isinstance(schema, Mapping):
        return schema is not False
    if isinstance(schema.get("$ref"), str) and schema["$ref"] not in finite:
        return False
    if not all(_is_finite(one, finite) for one in _listed(schema, "allOf")):
        return False
    for name in ("anyOf", "oneOf"):
        options = _listed(schema, name)
        if options and not any(_is_finite(one, finite) for one in options):
            return False
    match schema.get("type"):
        case "object":
            return all(_is_finite(one, finite) for one in _required(schema))
        case "array":
            return all(_is_finite(one, finite) for one in _first_items(schema))
    return True


def _required(schema: Mapping[str, Any]) -> Iterator[Any]:
    """The schemas of an object's required properties."""
    given = schema.get("properties")
    properties = given if isinstance(given, Mapping) else {}
    for name in _listed(schema, "required"):
        known = isinstance(name, str) and name in properties
        yield properties[name] if known else schema.get("additionalProperties")


def _first_items(schema: Mapping[str, Any]) -> list[Any]:
    """The schemas of the items that an array has in any case."""
    least = schema.get("minItems", 0)
    if not isinstance(least, int | float) or least < 1:
        return []
    prefix = _listed(schema, "prefixItems")
    return prefix[: int(least)] + ([schema.get("items")] if least > len(prefix) else [])


def _listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    found = schema.get(name)
    return list(found) if isinstance(found, list | tuple) else []


def _references(schema: Any) -> Iterator[str]:
    """All references anywhere; one in mere data costs a look and changes nothing."""
    if isinstance(schema, Mapping):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        schema = list(schema.values())
    if isinstance(schema, list | tuple):
        for one in schema:
            yield from _references(one)


def _target(root: Mapping[str, Any], ref: str) -> Any:
    """What a reference points to; True, which any value satisfies, where it is none into this document."""
    found: Any = root
    if not ref.startswith("#") or (ref != "#" and not ref.startswith("#/")):
        return True
    for part in unquote(ref).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return True
    return found
