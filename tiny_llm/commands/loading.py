"""Owns the way from a command's options to a loaded model, with a bar while a large one is read."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tiny_llm.commands.bar import Bar
from tiny_llm.distributed.meeting import Ranks, launched
from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import ConfigError
from tiny_llm.memory import parse_bytes
from tiny_llm.models.registry import add_plugin
from tiny_llm.options import EngineOptions
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.weights.assemble import Progress

LOADING, TRYING = "Loading", "Trying our kernels on this machine, once"
LARGE_BYTES = 2**28
"""Weights from this size on get a progress bar; smaller ones are there before it would be seen."""


def load(options: EngineOptions) -> LLM:
    """The model that ``options`` name, ready to answer."""
    with Bar(LOADING) as bar, Bar(TRYING) as trying:
        llm = LLM(**arguments(options), progress=_progress(bar), trying=trying.show)
    if llm.kernels.line:
        print(llm.kernels.line, file=sys.stderr)
    return llm


def load_async(given: Mapping[str, Any]) -> AsyncLLM:
    """A model on a thread of its own, of what ``arguments`` has made of its options."""
    with Bar(LOADING) as bar, Bar(TRYING) as trying:
        return AsyncLLM(**given, progress=_progress(bar), trying=trying.show)


def arguments(options: EngineOptions, **limits: Any) -> dict[str, Any]:
    """What ``LLM`` takes, by name, as most options have them; ``limits`` are of ``SchedulerSettings``'s."""
    given = {one.name: getattr(options, one.name) for one in fields(options)}
    if (plugin := given.pop("plugin")) is not None:
        add_plugin(Path(plugin))
    for name in ("kv_memory", "swap_memory", "kv_disk_size"):
        if given[name] is not None:
            given[name] = parse_bytes(given[name], f"--{name.replace('_', '-')}")
    given["ranks"] = _ranks(
        given.pop("ranks"),
        given.pop("rank_address"),
        given.pop("rank_timeout"),
        _shares(given.pop("parallel"), given.pop("shares")),
    )
    given["swap_memory"] = given["swap_memory"] or 0
    given["max_context"] = given.pop("max_model_len")
    given["scheduler"] = SchedulerSettings(max_step_ms=given.pop("max_step_ms"), **limits)
    return given


def _shares(parallel: str, text: str | None) -> tuple[float, ...] | None:
    """Of a pipeline, () if they are not given; None where there is none."""
    if parallel == "tensor":
        if text is not None:
            raise ConfigError("--shares cuts the work of --parallel pipeline: give both, or neither.")
        return None
    try:
        return tuple(float(share) for share in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"shares (--shares) are {text!r}, expected numbers, such as 2,1.") from None


def _ranks(
    size: int | None, address: str | None, timeout_s: float, shares: tuple[float, ...] | None
) -> Ranks:
    """As ``mlx.launch`` says, or as the options do. Raises ConfigError where the two do not agree."""
    found = launched()
    if found is None:
        return Ranks(1 if size is None else size, address, timeout_s, shares=shares)
    if size not in (None, found.size) or address is not None:
        raise ConfigError(f"mlx.launch has started {found.size} ranks: leave --ranks and --rank-address out.")
    return replace(found, timeout_s=timeout_s, shares=shares)


def _progress(bar: Bar) -> Progress:
    """What the loader calls: ``bar``, where there is much to be read."""

    def show(done: int, total: int) -> None:
        if total >= LARGE_BYTES:
            bar.show(done / total, f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    return show
