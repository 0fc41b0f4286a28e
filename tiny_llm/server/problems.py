"""Owns what a client is told when something is wrong: OpenAI's error body, a status, a header.

Every error of ours has its place in ``problem_of``; whatever else happens is a 500 that tells nothing
of our insides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from tiny_llm.engine.async_llm import EngineDeadError
from tiny_llm.errors import (
    BusyError,
    CapacityError,
    ConfigError,
    ContextError,
    RequestError,
    TinyLLMError,
    did_you_mean,
)

RETRY_AFTER_S = 1
_LONGEST_MESSAGE = 1_000
_KINDS_OF_ITEMS = frozenset({"message", "function_call", "function_call_output", "reasoning"})
"""pydantic tells which kind of input item it took one for, as if that were a field."""


class Problem(HTTPException):
    """What is wrong with a request, or with us, as the client will read it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        retry = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
        login = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        super().__init__(status, message[:_LONGEST_MESSAGE], headers={**retry, **login, **(headers or {})})
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, object]:
        """OpenAI's error body."""
        if self.status_code >= 500:
            kind = "server_error"
        elif self.status_code == 429:
            kind = "rate_limit_error"
        else:
            kind = "invalid_request_error"
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status_code, headers=self.headers)


def problem_of(error: Exception) -> Problem:
    """The problem that an exception stands for."""
    match error:
        case Problem():
            return error
        case RequestValidationError():
            return _invalid(error.errors())
        case StarletteHTTPException():
            return Problem(error.status_code, str(error.detail), headers=_allowed(error.headers))
        case BusyError():
            return Problem(429, str(error), code="queue_full")
        case CapacityError() | ContextError():
            return Problem(400, str(error), code="context_length_exceeded", param="messages")
        case RequestError():
            return Problem(400, str(error), code=error.code, param=error.param)
        case ConfigError():  # of the model: no chat template, for example
            return Problem(400, str(error), code="unsupported")
        case EngineDeadError() | TinyLLMError():
            return Problem(503, str(error), code="engine_dead")
        case _:
            return Problem(500, "The server failed on this request; its log says why.", code="internal_error")


def _allowed(headers: Mapping[str, str] | None) -> dict[str, str]:
    """The methods that a path has, where that was the fault: whatever can be read has a head."""
    methods = (headers or {}).get("Allow", "")
    return {"Allow": methods.replace("GET", "GET, HEAD")} if methods else {}


def _invalid(errors: Sequence[Any]) -> Problem:
    """The first of pydantic's complaints, in our words."""
    first = errors[0]
    where = _place(first["loc"])
    name = _path(where) or None
    if first["type"] == "extra_forbidden":
        known = first.get("ctx", {}).get("known", ())
        hint = did_you_mean(str(where[-1]), known)
        return Problem(400, f"{name} is not supported here.{hint}", code="unsupported_field", param=name)
    if first["type"] == "missing":
        return Problem(400, f"{name or 'A JSON body'} is missing.", code="missing", param=name)
    message = str(first["msg"]).removeprefix("Value error, ")
    said = f"{name}: {message}" if name else f"The body: {message}"
    return Problem(400, f"{said.rstrip('.')}.", code="invalid_value", param=name)


def _place(loc: Sequence[str | int]) -> list[str | int]:
    """Where pydantic complains, without the names that it adds: "body", and the kind of an item of a list."""
    place: list[str | int] = []
    for before, part in zip((None, *loc), loc, strict=False):
        is_kind = isinstance(before, int) and part in _KINDS_OF_ITEMS
        if part != "body" and not is_kind:
            place.append(part)
    return place


def _path(place: Sequence[str | int]) -> str:
    """A place as clients write it: messages[0].content."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    return "".join(parts).removeprefix(".")
