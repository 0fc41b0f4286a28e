"""Owns what a rank does that is not the first: a plan in, its pages moved, its part computed, nothing out."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from tiny_llm.distributed.messages import Begin, DoStep, Leave, WarmUp
from tiny_llm.distributed.team import Team
from tiny_llm.engine.ranks import held
from tiny_llm.engine.runner import Runner
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.kv.paged import PagedCache
from tiny_llm.memory import limit_kept_memory, wire_memory
from tiny_llm.models.checkpoint import Checkpoint
from tiny_llm.models.registry import Model
from tiny_llm.ops.backend import isa, use
from tiny_llm.ops.kv_pool import KvFormat
from tiny_llm.proving.choice import Kernels


def join_in(
    team: Team | None, stored: Checkpoint, model: Model, kernels: Kernels, engine: EngineSettings
) -> EngineSettings:
    """``engine`` with no more blocks than the rank has room for that has the least.

    In all but the first, follow it, and end the process when it leaves. Raises GroupError where ranks have
    other weights, or run them on other kernels.
    """
    if team is None:
        return engine
    with held(team):
        facts: dict[str, object] = {"backend": kernels.backend, "kernels": sorted(kernels.on_ours or ())}
        facts |= {"TINY_LLM_CPU_ISA": isa(), "weights": stored.digest().hex()}
        team.agree(facts | {"block size": engine.block_size})
        blocks, host = zip(*team.share([engine.kv_blocks, engine.host_blocks]), strict=True)
    if team.rank:
        follow(team, model, kernels)
        raise SystemExit(0)
    return replace(engine, kv_blocks=min(blocks), host_blocks=min(host))


def follow(team: Team, model: Model, kernels: Kernels) -> None:
    """Do what rank 0 tells until it leaves. Raises GroupError if it goes otherwise."""
    limit_kept_memory()
    wire_memory()
    runners: dict[int, Runner] = {}
    with held(team), use(kernels.backend, kernels.ours):
        last = mx.array(0)
        while not isinstance(told := team.hear(), Leave):
            if isinstance(told, Begin):
                format = KvFormat.of(model.config, told.block_size, getattr(mx, told.kv_dtype))
                cache = PagedCache(format, max_blocks=told.max_blocks, host_blocks=told.host_blocks)
                runners[told.engine] = Runner(model, cache, kernels)
            elif isinstance(told, DoStep):
                last = _carry_out(team, runners[told.engine], told, last)
            elif isinstance(told, WarmUp):
                runners[told.engine].warm_up(told.most_blocks)
            else:
                runners.pop(told.engine, None)
    team.close()


def _carry_out(team: Team, runner: Runner, told: DoStep, last: mx.array) -> mx.array:
    """A step after the one that makes ``last``; what it makes itself, on its way."""
    if not told.drawn:  # rank 0 has waited for it, too
        mx.eval(last)
    runner.move(told.plan)
    if not told.items:
        return last
    drawn = None
    if told.drawn:
        drawn = team.group.all_gather(mx.zeros(told.drawn, mx.int32))[: told.drawn]
    logits = runner.forward(told.plan, drawn, lambda _: None)
    mx.async_eval(logits)  # type: ignore[no-untyped-call]  # MLX's stubs lack its types
    mx.eval(last)
    return logits
