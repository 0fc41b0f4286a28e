"""Owns what gateways ask of a server before and while they send it requests: its model, limits and load.

Names are SGLang's, which smg, sglang-router and vllm-router read. A model is called by the name that
clients use: no path of ours is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter

from tiny_llm.engine.llm import LLM
from tiny_llm.server.service import Service
from tiny_llm.version import __version__

_TIMEOUT_S = 5.0


def gateway_routes(service: Service) -> APIRouter:
    """Each once in OpenAPI; the other spellings are those of other versions."""
    router = APIRouter(tags=["gateways"])

    async def asked(what: Callable[[LLM], dict[str, Any]]) -> dict[str, Any]:
        return await asyncio.wait_for(service.engine.call(what), _TIMEOUT_S)

    @router.get("/get_server_info", include_in_schema=False)
    @router.get("/server_info")
    async def server_info() -> dict[str, Any]:
        """Limits: tokens of a context and of the KV pool, sequences that run at a time, tokens of a block."""
        return {**_named(service), "version": __version__, "dp_size": 1, **await asked(_limits)}

    @router.get("/model_info", include_in_schema=False)
    @router.get("/get_model_info")
    async def model_info() -> dict[str, Any]:
        """What the model is: its family as config.json calls it; text in, text out."""
        told = {"is_generation": True, "has_image_understanding": False, "has_audio_understanding": False}
        return {**_named(service), **told, "model_type": service.llm.config.model_type}

    @router.get("/loads", include_in_schema=False)
    @router.get("/v1/loads")
    async def loads() -> dict[str, Any]:
        """Sequences that run and wait, and how full the KV pool is, now; what prefixes brought so far."""
        now = datetime.now(UTC).isoformat()
        return {"timestamp": now, "version": __version__, "dp_rank_count": 1, "loads": [await asked(_load)]}

    return router


def _named(service: Service) -> dict[str, Any]:
    return {"served_model_name": service.settings.name, "model_path": service.settings.name}


def _limits(llm: LLM) -> dict[str, Any]:
    settings, blocks = llm.engine.settings, llm.engine.scheduler.usage()
    return {
        "context_length": llm.max_context,
        "max_total_tokens": blocks.limit * settings.block_size,
        "max_running_requests": settings.scheduler.max_num_seqs,
        "block_size": settings.block_size,
    }


def _load(llm: LLM) -> dict[str, Any]:
    stats, limits = llm.engine.stats(), _limits(llm)
    looked_for = stats.prefix_hit_tokens + stats.prefix_miss_tokens
    return {
        "dp_rank": 0,
        "num_running_reqs": stats.running,
        "num_waiting_reqs": stats.waiting,
        "num_total_reqs": stats.running + stats.waiting,
        "num_used_tokens": stats.blocks.used * limits["block_size"],
        "max_total_num_tokens": limits["max_total_tokens"],
        "token_usage": stats.blocks.used / stats.blocks.limit,
        "cache_hit_rate": stats.prefix_hit_tokens / looked_for if looked_for else 0.0,
        "max_running_requests": limits["max_running_requests"],
    }
