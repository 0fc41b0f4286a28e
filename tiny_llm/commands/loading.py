"""Owns the way from a command's options to a loaded model, with a bar while a large one is read."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tiny_llm.commands.bar import Bar
from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.llm import LLM
from tiny_llm.memory import parse_bytes
from tiny_llm.options import EngineOptions
from tiny_llm.scheduler.settings import SchedulerSettings

LARGE_BYTES = 2**28
"""Weights from this size on get a progress bar; smaller ones are there before it would be seen."""


def load(options: EngineOptions) -> LLM:
    """The model that ``options`` name, ready to answer."""
    with _LoadingBar() as bar, _Trying() as trying:
        llm = LLM(**arguments(options), progress=bar, trying=trying)
    if llm.kernels.line:
        print(llm.kernels.line, file=sys.stderr)
    return llm


def load_async(given: Mapping[str, Any]) -> AsyncLLM:
    """A model on a thread of its own, of what ``arguments`` has made of its options."""
    with _LoadingBar() as bar, _Trying() as trying:
        return AsyncLLM(**given, progress=bar, trying=trying)


def arguments(options: EngineOptions, **limits: Any) -> dict[str, Any]:
    """What ``LLM`` takes, by name; ``limits`` are further fields of ``SchedulerSettings``."""
    return {
        "model": options.model,
        "dtype": options.dtype,
        "quantize": options.quantize,
        "offline": options.offline,
        "backend": options.backend,
        "kernels": options.kernels,
        "same_tokens": options.same_tokens,
        "threads": options.threads,
        "activations": options.activations,
        "max_context": options.max_model_len,
        "kv_memory": None if options.kv_memory is None else parse_bytes(options.kv_memory, "--kv-memory"),
        "swap_memory": 0
        if options.swap_memory is None
        else parse_bytes(options.swap_memory, "--swap-memory"),
        "kv_disk": options.kv_disk,
        "kv_disk_size": parse_bytes(options.kv_disk_size, "--kv-disk-size"),
        "speculate": options.speculate,
        "draft": options.draft,
        "scheduler": SchedulerSettings(max_step_ms=options.max_step_ms, **limits),
    }


class _Trying(Bar):
    """What is called while kernels are tried."""

    def __init__(self) -> None:
        super().__init__("Trying our kernels on this machine, once")

    def __enter__(self) -> _Trying:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, part: float, words: str) -> None:
        """Show ``part`` of 1, and what is tried."""
        self.show(part, words)


class _LoadingBar:
    """What the loader calls with its progress."""

    def __init__(self) -> None:
        self._bar = Bar("Loading")

    def __enter__(self) -> _LoadingBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes are read."""
        if total >= LARGE_BYTES:
            self._bar.show(done / total, f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB")
