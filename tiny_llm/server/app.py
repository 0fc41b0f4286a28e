"""Owns the routes: which path is answered by what, and how every error leaves.

No work of its own: a route checks nothing that a body or the guard could, and computes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from tiny_llm.errors import TinyLLMError
from tiny_llm.server.chat_bodies import ChatBody
from tiny_llm.server.chat_completions import chat
from tiny_llm.server.completions import completion
from tiny_llm.server.contexts import add_context, list_contexts, remove_context
from tiny_llm.server.embeddings import embed
from tiny_llm.server.events import EventStream, answered, large_json
from tiny_llm.server.gateways import gateway_routes
from tiny_llm.server.live import Live
from tiny_llm.server.message_bodies import CountBody, MessageBody
from tiny_llm.server.messages import count, message
from tiny_llm.server.page_files import page_routes
from tiny_llm.server.params import salt_of
from tiny_llm.server.problems import Problem, problem_of
from tiny_llm.server.prometheus import CONTENT_TYPE, exposition
from tiny_llm.server.response_bodies import ResponseBody
from tiny_llm.server.responses import respond
from tiny_llm.server.service import ClientGone, Service
from tiny_llm.server.stored import StoredResponses, stored_routes
from tiny_llm.server.strict_json import StrictRoute
from tiny_llm.server.text_bodies import (
    CompletionBody,
    ContextBody,
    DetokenizeBody,
    EmbeddingBody,
    GenerateBody,
    TokenizeBody,
)
from tiny_llm.server.texts import detokenize, generation, tokenize, tokenizer_info
from tiny_llm.version import __version__

METRICS_TIMEOUT_S = 5.0
_ERROR = ("message", "type", "param", "code")
_LOG = logging.getLogger("tiny_llm.server")


def create_app(service: Service, stored: StoredResponses | None = None) -> FastAPI:
    """The application without its guard, which goes around it. ``stored`` may be that of several."""
    app = FastAPI(
        title="tiny_llm",
        version=__version__,
        description="OpenAI-compatible. A field that is not listed here is refused with its name.",
        redoc_url=None,
        redirect_slashes=False,  # behind a proxy it would lead from https to http
    )
    app.include_router(page_routes())
    told = _documented_errors(*_ERROR)
    stored = stored or StoredResponses()
    looking = _operations(service), gateway_routes(service), stored_routes(stored)
    for routes in (*looking, _asking(service, stored)):
        app.include_router(routes, responses=told)
    for kind in (Exception, HTTPException, RequestValidationError, TinyLLMError, ClientGone):
        app.add_exception_handler(kind, _failed)
    return app


def _operations(service: Service) -> APIRouter:
    """What tells about the server."""
    router, name, live = APIRouter(tags=["operations"]), service.settings.name, Live(service)

    @router.get("/health", responses={503: {"description": "Not ready; the body says what we are."}})
    async def health() -> JSONResponse:
        state = service.state
        body = {"status": state, "live": state != "dead", "ready": state in ("ready", "unloaded")}
        headers = {} if body["ready"] else {"Retry-After": "1"}
        return JSONResponse(body, 200 if body["ready"] else 503, headers=headers)

    @router.get("/version")
    async def about() -> dict[str, str]:
        return {"version": __version__}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        told = service.engine.call(lambda llm: exposition(llm.engine.stats(), name, service.prompt_tokens))
        return Response(await asyncio.wait_for(told, METRICS_TIMEOUT_S), media_type=CONTENT_TYPE)

    @router.get("/live", include_in_schema=False)  # it never ends, and is the page's own
    async def watch() -> Response:
        return EventStream(await live.watch())

    @router.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [model_card(service)]}

    @router.get("/v1/models/{model:path}")
    async def card(model: str) -> dict[str, object]:
        service.require_model(model)
        return model_card(service)

    @router.get("/v1/contexts", responses=_documented("object", "data"))
    async def contexts(request: Request, cache_salt: str | None = None) -> dict[str, object]:
        return await list_contexts(service, salt_of(request.state.salt, cache_salt))

    @router.delete("/v1/contexts/{name:path}", responses=_documented("id", "object", "deleted"))
    async def removed(request: Request, name: str, cache_salt: str | None = None) -> dict[str, object]:
        return await remove_context(service, name, salt_of(request.state.salt, cache_salt))

    @router.get("/tokenizer_info")
    async def tokenizer_facts() -> dict[str, object]:
        return tokenizer_info(service)

    return router


def model_card(service: Service) -> dict[str, object]:
    """What is told of a model; how long its context is, while it is loaded."""
    length = None if service.state == "unloaded" else service.llm.max_context
    known = {"id": service.settings.name, "object": "model", "created": service.created}
    return {**known, "owned_by": "tiny_llm", "max_model_len": length}


def _asking(service: Service, stored: StoredResponses) -> APIRouter:
    """What the model does."""
    router = APIRouter(route_class=StrictRoute, tags=["inference"])
    theirs = _documented_errors("message", "type")

    @router.post("/v1/completions", responses=_documented("id", "object", "choices", "usage", streams=True))
    async def completions(request: Request, body: CompletionBody) -> Response:
        return await answered(service, request, body, completion)

    @router.post("/v1/chat/completions", responses=_documented("id", "choices", "usage", streams=True))
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        return await answered(service, request, body, chat)

    @router.post("/v1/responses", responses=_documented("id", "status", "output", "usage", streams=True))
    async def responses(request: Request, body: ResponseBody) -> Response:
        return await respond(service, stored, request, body)

    @router.post("/v1/messages", responses=_documented("id", "content", "usage", streams=True) | theirs)
    async def messages(request: Request, body: MessageBody) -> Response:
        return await message(service, request, body)

    @router.post("/v1/messages/count_tokens", responses=_documented("input_tokens") | theirs)
    async def counted(request: Request, body: CountBody) -> dict[str, int]:
        return await count(service, request, body)

    @router.post("/v1/embeddings", responses=_documented("object", "data", "model", "usage"))
    async def embeddings(request: Request, body: EmbeddingBody) -> Response:
        return await embed(service, request, body)

    @router.post("/generate", responses=_documented("answers", "usage", streams=True))
    async def generated(request: Request, body: GenerateBody) -> Response:
        return await answered(service, request, body, generation)

    @router.post("/v1/contexts", responses=_documented("id", "object", "tokens"))
    async def context(request: Request, body: ContextBody) -> dict[str, object]:
        return await add_context(service, request, body)

    @router.post("/tokenize", responses=_documented("count", "tokens", "max_model_len"))
    async def tokenized(body: TokenizeBody) -> Response:
        return await large_json(lambda: tokenize(service, body))

    @router.post("/detokenize", responses=_documented("prompt"))
    async def detokenized(body: DetokenizeBody) -> Response:
        return await large_json(lambda: detokenize(service, body))

    return router


async def _failed(request: Request, error: Exception) -> Response:
    """Any exception as an error body."""
    if isinstance(error, ClientGone):
        return Response(status_code=499)  # nobody reads it
    problem = problem_of(error)
    allowed = (problem.headers or {}).get("Allow")
    if request.method == "OPTIONS" and allowed:  # that was the question
        return Response(status_code=204, headers={"Allow": f"{allowed}, OPTIONS"})
    if problem.status_code == 500 and not isinstance(error, Problem):
        asked = (request.state.request_id, request.method, request.url.path)
        _LOG.error("%s %s %s failed", *asked, exc_info=error)
    return problem.response(request.url.path)


def _documented(*keys: str, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """What an answer has at least; what it may be in other cases is in OpenAI's own documentation."""
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object", "required": list(keys)}}}
    if streams:
        event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
        content["text/event-stream"] = {"schema": event}  # of each event, until OpenAPI 3.2 has itemSchema
    return {200: {"description": "The answer.", "content": content}}


def _documented_errors(*names: str) -> dict[int | str, dict[str, Any]]:
    told = {
        400: "The request is wrong; error.param names the field.",
        401: "The API key is missing or wrong.",
        403: "Without a key, a server on a loopback address is called by localhost or that address only.",
        404: "There is no such model.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        415: "The Content-Type is not application/json.",
        429: "The queue is full; try again after Retry-After seconds.",
        431: "Too many headers, or too large ones.",
        500: "A fault of the server.",
        503: "Loading, draining, waited too long, or the engine is dead.",
    }
    texts = {name: {"type": ["string", "null"]} for name in names}
    error = {"type": "object", "required": list(names), "properties": texts}
    schema = {"type": "object", "required": ["error"], "properties": {"error": error}}
    content = {"application/json": {"schema": schema}}
    responses: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": content} for status, text in told.items()
    }
    return responses | {422: {"description": "Never sent: what is invalid is a 400."}}
