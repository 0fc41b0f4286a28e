"""Owns the step from a body's bytes to a checked body: what is not JSON, or not finite, ends here.

The parser is pydantic's: it refuses NaN and Infinity, invalid UTF-8, half surrogate pairs, numbers of
thousands of digits, and brackets nested 200 deep. 1e999 it reads as infinity, so that is looked for.
A large body is read in a thread. No other thread runs while the parser does, nor while the garbage collector
looks through what it made, so how much that may be is said here, and counted before.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from tiny_llm.server.problems import Problem, invalid

MAX_DEPTH = 64
MAX_CONTAINERS = 2**15  # objects and arrays of one body
MAX_NAMES = 2**16  # fields of all its objects together
MAX_VALUES = 2**18  # values of any kind
_PART_BYTES = 2**16
_OVERLAP = 300  # as long as what is looked for
_LARGE_NUMBER = re.compile(rb"[eE]\+?\d{3}|\d{300}")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_WHOLE = re.compile(rb'(?:[^"]*+"[^"\\]*+(?:\\.[^"\\]*+)*+")*+[^"]*+', re.DOTALL)
"""All up to a string without an end: no other pattern tries each of its quotes for a beginning."""
_STRUCTURE = (  # what is counted, the most of it, what that is called
    ((b"{", b"["), MAX_CONTAINERS, "objects and arrays"),
    ((b":",), MAX_NAMES, "fields"),
    ((b",",), MAX_VALUES, "values"),
)


def parse(body: bytes) -> dict[str, Any]:
    """The object that ``body`` is.

    Raises Problem for what is no JSON object, holds an infinity, is nested too deep, or has too many parts.
    """
    PartCount("The body has").add(body)
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise Problem(400, f"The body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(value, dict):
        names: Mapping[type, str] = {list: "array", str: "string", bool: "boolean", type(None): "null"}
        kind = names.get(type(value), "number")
        raise Problem(400, f"The body is a JSON {kind}, but must be an object.", code="invalid_json")
    starts = range(0, len(body), _PART_BYTES)  # part by part: no other thread runs during a search
    has_large = any(_LARGE_NUMBER.search(body, start, start + _PART_BYTES + _OVERLAP) for start in starts)
    if has_large or body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _check(value)
    return value


class PartCount:
    """How many parts some JSON has, which need not be whole. A string's characters are no parts."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._counts = [0] * len(_STRUCTURE)

    def add(self, written: bytes) -> None:
        """Raises Problem once there are more parts than are read in a moment."""
        place = 0
        while place < len(written):
            part = written[place : place + _PART_BYTES]
            whole = _WHOLE.match(part)
            assert whole is not None, "it matches nothing too"
            exceeded = self._exceeded(_STRING.sub(b"", whole[0]))
            if exceeded:
                raise Problem(400, f"{self._subject} {exceeded}, which is the most.", code="too_complex")
            place += whole.end()
            if len(whole[0]) < len(part):  # then a string goes on beyond this part
                found = _STRING.match(written, place)
                place = found.end() if found else len(written)  # without an end: the parser says so

    def _exceeded(self, written: bytes) -> str:
        """Count what is written; say what is too much, if anything is."""
        for number, (marks, most, name) in enumerate(_STRUCTURE):
            self._counts[number] += sum(map(written.count, marks))
            if self._counts[number] > most:
                return f"more than {most:,} {name}"
        return ""


def _check(value: object) -> None:
    """Walk through everything, level by level."""
    level, depth = [value], 1
    while level:
        if depth > MAX_DEPTH:
            raise Problem(400, f"The body is nested more than {MAX_DEPTH} deep.", code="invalid_json")
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, float) and not math.isfinite(item):
                raise Problem(400, "The body has a number that is not finite.", code="invalid_json")
        level, depth = below, depth + 1


class _StrictRequest(Request):
    """A request whose ``json`` is the body that ``model`` makes of it: FastAPI takes that as it is."""

    model: type[BaseModel]

    async def json(self) -> Any:
        body = await self.body()
        if len(body) <= _PART_BYTES:
            return parse(body)
        return await asyncio.to_thread(_checked, self.model, body)


def _checked(model: type[BaseModel], body: bytes) -> BaseModel:
    value = parse(body)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False), value) from error


class StrictRoute(APIRoute):
    """A route whose body is read by ``parse``, and is called JSON: no other site's form can send that."""

    def get_route_handler(self) -> Any:
        """FastAPI's hook: the handler gets our kind of request."""
        handler = super().get_route_handler()
        assert self.body_field is not None, "such a route has a body"
        model: Any = self.body_field.field_info.annotation

        async def strict(request: Request) -> Any:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                what = f"The Content-Type is {kind[:80]!r}, but must be 'application/json'."
                raise Problem(415, what, code="unsupported_media_type")
            asked = _StrictRequest(request.scope, request.receive)
            asked.model = model
            return await handler(asked)

        return strict
