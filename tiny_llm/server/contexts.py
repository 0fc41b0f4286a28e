"""Owns /v1/contexts: texts that are computed once, and stand before the prompts that name them."""

from __future__ import annotations

from fastapi import Request

from tiny_llm.engine.contexts import ContextInfo, NewContext
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import RequestError
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.server.params import prompt_ids, salt_of
from tiny_llm.server.problems import Problem
from tiny_llm.server.service import Service, aside
from tiny_llm.server.text_bodies import ContextBody


async def add_context(service: Service, request: Request, body: ContextBody) -> dict[str, object]:
    """Compute a text and keep it. Raises Problem, RequestError or CapacityError for one that cannot be."""
    if problem := service.problem():
        raise problem
    (ids,) = await aside(request, lambda: prompt_ids(service.llm, [body.text]))
    salt, new = salt_of(request.state.salt, body.cache_salt), NewContext(body.name, body.ttl)
    await service.engine.generate(ids, SamplingParams(max_tokens=1), salt=salt, context=new)
    return _told(await service.engine.call(lambda llm: llm.engine.contexts.told(body.name, salt)))


async def list_contexts(service: Service, salt: str) -> dict[str, object]:
    """What there is of a key."""
    there = await service.engine.call(lambda llm: llm.engine.contexts.listed(salt))
    return {"object": "list", "data": [_told(one) for one in there]}


async def remove_context(service: Service, name: str, salt: str) -> dict[str, object]:
    """Let go of one. Raises Problem for a name that there is not."""

    def remove(llm: LLM) -> None:
        llm.engine.contexts.remove(name, salt)

    try:
        await service.engine.call(remove)
    except RequestError as error:
        raise Problem(404, str(error), code="context_not_found", param="name") from error
    return {"id": name, "object": "context", "deleted": True}


def _told(context: ContextInfo) -> dict[str, object]:
    return {
        "id": context.name,
        "object": "context",
        "tokens": context.tokens,
        "bytes": context.bytes,
        "hits": context.hits,
        "expires_in": context.left_s,
        "ready": context.is_ready,
    }
