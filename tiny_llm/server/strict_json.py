"""Owns the step from a body's bytes to JSON values: what is not JSON, or not finite, ends here.

The parser is pydantic's: it refuses NaN and Infinity, invalid UTF-8, half surrogate pairs, numbers of
thousands of digits, and brackets nested 200 deep. 1e999 it reads as infinity, so that is looked for.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic_core import from_json

from tiny_llm.server.problems import Problem

MAX_DEPTH = 64
_PART_BYTES = 2**16
_OVERLAP = 300  # as long as what is looked for
_LARGE_NUMBER = re.compile(rb"[eE]\+?\d{3}|\d{300}")


def parse(body: bytes) -> dict[str, Any]:
    """The object that ``body`` is.

    Raises Problem for what is no JSON object, holds an infinity, or is nested too deep.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Problem(400, f"The body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(value, dict):
        raise Problem(400, f"The body is a JSON {_kind(value)}, but must be an object.", code="invalid_json")
    if _has_large_number(body) or body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _check(value)
    return value


def _has_large_number(body: bytes) -> bool:
    """Part by part: no other thread runs during a search."""
    starts = range(0, len(body), _PART_BYTES)
    return any(_LARGE_NUMBER.search(body, start, start + _PART_BYTES + _OVERLAP) for start in starts)


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


def _kind(value: object) -> str:
    names: Mapping[type, str] = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


class _StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        if len(body) <= _PART_BYTES:
            return parse(body)
        return await asyncio.to_thread(parse, body)


class StrictRoute(APIRoute):
    """A route whose body is read by ``parse``, and is called JSON: no other site's form can send that."""

    def get_route_handler(self) -> Any:
        """FastAPI's hook: the handler gets our kind of request."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Any:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                what = f"The Content-Type is {kind[:80]!r}, but must be 'application/json'."
                raise Problem(415, what, code="unsupported_media_type")
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict
