"""Owns what simulations are compared by: each policy a field, which is an option of the command too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tiny_llm.errors import ConfigError
from tiny_llm.limits import check_number, check_whole
from tiny_llm.options import option
from tiny_llm.planning.simulation.contiguous import Memory, Reserve
from tiny_llm.scheduler.settings import Preemption

_MEMORY, _ORDER, _WHERE = "Memory", "Steps", "Engines"


@dataclass(frozen=True, slots=True)
class Policy:
    """How requests are served. Raises ConfigError for a number that cannot work."""

    memory: Annotated[
        Memory,
        option(_MEMORY, "paged: blocks; else one run a sequence, in the first, the best or a buddy's hole."),
    ] = "paged"
    reserve: Annotated[
        Reserve,
        option(
            _MEMORY,
            "What a run has room for: the answer's very length, the next power of two, or --max-model-len.",
        ),
    ] = "max"
    max_model_len: Annotated[int, option(_MEMORY, "Tokens of prompt and answer together.")] = 2048
    kv_tokens: Annotated[
        int | None, option(_MEMORY, "Tokens that the pool holds; by default what the device leaves.")
    ] = None
    block_size: Annotated[int, option(_MEMORY, "Tokens of a block.")] = 16
    prefix_cache: Annotated[
        Literal["off", "on", "disk"],
        option(_MEMORY, "Whether blocks are found again; disk: also those that have left the pool."),
    ] = "on"
    disk_tokens: Annotated[int, option(_MEMORY, "Tokens that the disk holds.")] = 10**8
    disk_gb_s: Annotated[float, option(_MEMORY, "How fast the disk is read and written.")] = 3.0
    preemption: Annotated[
        Preemption, option(_MEMORY, "How a sequence makes room; auto: the sooner done of both.")
    ] = "recompute"
    host_tokens: Annotated[int, option(_MEMORY, "Tokens that may be swapped out.")] = 10**6
    link_gb_s: Annotated[
        float, option(_MEMORY, "How fast keys and values go to the host, or to another engine.")
    ] = 20.0
    max_concurrent: Annotated[int, option(_ORDER, "Sequences in a step.")] = 256
    chunk_budget: Annotated[int, option(_ORDER, "Tokens in a step.")] = 2048
    max_step_ms: Annotated[float, option(_ORDER, "What a step with chunks of prompts may take.")] = 100.0
    order: Annotated[
        Literal["fcfs", "priority", "shortest"],
        option(_ORDER, "Who is first: who came first, is --urgent, or is shortest, prompt and answer."),
    ] = "fcfs"
    ageing_s: Annotated[
        float, option(_ORDER, "Seconds of waiting that a level of priority is worth.", "--ageing-s")
    ] = 10.0
    acceptance: Annotated[
        float,
        option(_ORDER, "Of guessed tokens this share is right; guesses cost nothing. 0: none are made."),
    ] = 0.0
    replicas: Annotated[int, option(_WHERE, "Engines, each with a pool of its own.")] = 1
    routing: Annotated[
        Literal["round-robin", "random", "prefix"],
        option(_WHERE, "Who gets a request; prefix: who has most of its prompt, if not too busy."),
    ] = "round-robin"
    prefill: Annotated[int, option(_WHERE, "More engines, which read prompts for the others.")] = 0

    def __post_init__(self) -> None:
        counts = ("max_model_len", "block_size", "disk_tokens", "host_tokens", "max_concurrent")
        for name in (*counts, "chunk_budget", "replicas"):
            check_whole(name, getattr(self, name))
        check_whole("prefill", self.prefill, least=0)
        if self.kv_tokens is not None:
            check_whole("kv_tokens", self.kv_tokens)
        for name in ("disk_gb_s", "link_gb_s", "max_step_ms", "ageing_s"):
            check_number(name, getattr(self, name))
        check_number("acceptance", self.acceptance, zero=True, most=1.0)
        if self.prefill and self.memory != "paged":
            raise ConfigError(
                f"prefill is {self.prefill}, but what is handed over are blocks; leave memory paged."
            )
