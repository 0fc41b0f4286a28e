"""Owns what a client is told when something is wrong: OpenAI's error body, a status, a header.

Every error of ours has its place in ``problem_of``; whatever else happens is a 500 that tells nothing
of our insides.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from tiny_llm import errors
from tiny_llm.engine.async_llm import EngineDeadError, StoppedError

RETRY_AFTER_S = 1
ANTHROPIC_PATH = "/v1/messages"  # below it, errors have Anthropic's shape
_ANTHROPIC_KINDS: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_LONGEST_MESSAGE = 1_000


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

    @property
    def anthropic_body(self) -> dict[str, object]:
        """Anthropic's error body; it has no place for the field, which the message names."""
        usual = "invalid_request_error" if self.status_code < 500 else "api_error"
        kind = _ANTHROPIC_KINDS.get(self.status_code, usual)
        return {"type": "error", "error": {"type": kind, "message": self.detail}}

    def response(self, path: str) -> JSONResponse:
        """The whole answer to a request for ``path``."""
        is_theirs = path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")
        body = self.anthropic_body if is_theirs else self.body
        return JSONResponse(body, self.status_code, headers=self.headers)


def problem_of(error: Exception, *, asked_by: str = "messages") -> Problem:
    """The problem that an exception stands for; ``asked_by`` is the field that a prompt too long came in."""
    match error:
        case Problem():
            return error
        case RequestValidationError():
            return invalid([{**one, "loc": one["loc"][1:]} for one in error.errors()], error.body)
        case StarletteHTTPException():
            methods = (error.headers or {}).get("Allow", "")
            # What can be read has a head.
            allowed = {"Allow": methods.replace("GET", "GET, HEAD")} if methods else {}
            return Problem(error.status_code, str(error.detail), headers=allowed)
        case errors.BusyError():
            return Problem(429, str(error), code="queue_full")
        case errors.CapacityError() | errors.ContextError():
            return Problem(400, str(error), code="context_length_exceeded", param=asked_by)
        case errors.RequestError():
            return Problem(400, str(error), code=error.code, param=error.param)
        case errors.ConfigError():  # of the model: no chat template, for example
            return Problem(400, str(error), code="unsupported")
        case StoppedError():
            return Problem(503, str(error), code="draining")
        case EngineDeadError() | errors.TinyLLMError():
            return Problem(503, str(error), code="engine_dead")
        case _:
            return Problem(500, "The server failed on this request; its log says why.", code="internal_error")


@contextmanager
def renamed(names: Iterable[tuple[str, str]]) -> Generator[None]:
    """What is refused meanwhile is told in another interface's words: patterns of fields, its own names."""
    try:
        yield
    except (Problem, errors.TinyLLMError) as error:
        problem = problem_of(error)
        param, message = problem.param or "", problem.detail
        for theirs, ours in names:
            if re.match(theirs, param):
                told, name = (re.sub(theirs, ours, text) for text in (message, param))
                raise Problem(problem.status_code, told, code=problem.code, param=name) from error
        raise problem from error


def invalid(complaints: Sequence[Any], body: object) -> Problem:
    """The complaint of pydantic's about ``body`` that is most to the point, in our words.

    Of a field that may be one of several things there is a complaint for each; that about the deepest place
    is about what was meant.
    """
    places = [_place(error, body) for error in complaints]
    about_first = [number for number, place in enumerate(places) if place[:1] == places[0][:1]]
    number = max(about_first, key=lambda number: len(places[number]))
    error = complaints[number]
    # As clients write it: messages[0].content.
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in places[number]]
    name = "".join(parts).removeprefix(".") or None
    given, code = error.get("ctx", {}), "invalid_value"
    match error["type"]:
        case "extra_forbidden":
            return Problem(400, f"{name} is not supported here.", code="unsupported_field", param=name)
        case "missing":
            return Problem(400, f"{name or 'A JSON body'} is missing.", code="missing", param=name)
        case "misplaced":
            message, code = given["message"], given["code"]
        case _:
            message = str(error["msg"]).removeprefix("Value error, ")
    return Problem(400, f"{name or 'The body'}: {message.rstrip('.')}.", code=code, param=name)


def _place(error: Mapping[str, Any], body: object) -> list[str | int]:
    """Where pydantic complains: what of its own path is there in the body.

    The rest are the validator's names: a union's alternatives, a kind of item.
    """
    place: list[str | int] = []
    value, more = body, error.get("ctx", {})
    for part in error["loc"]:
        if isinstance(value, dict) and str(part) in value:
            value = value[str(part)]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        place.append(part)
    if error["type"] == "missing":
        place += error["loc"][-1:]
    if "discriminator" in more:
        place.append(more["discriminator"].strip("'"))
    return [*place, *more.get("within", ())]
