"""Owns what an operator may set about scheduling, and checks it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from tiny_llm.errors import ConfigError

Preemption = Literal["auto", "recompute", "swap"]
MAX_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """Bounds and policies.

    A step has at most ``max_num_batched_tokens`` tokens, of at most ``max_num_seqs`` sequences. While
    sequences decode, chunks of prompts are sized for the step to take ``max_step_ms``. Where the decodes
    alone take as long, prompts still move on, by up to 8 tokens a step, or as few as add half of that time.
    Beyond those that free slots are enough for, at most ``max_queued_requests`` new requests wait; each
    waits at most ``max_wait_s`` seconds.
    One level of priority is worth ``ageing_s`` seconds of waiting. ``preemption`` says how a
    sequence makes room for others; "auto" takes the cheaper way, given what a block's way
    to the host and back takes (``swap_ms_per_block``; None: the engine measures it).

    Raises ConfigError for a value that cannot work.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_step_ms: float = 100.0
    max_queued_requests: int = 1024
    max_wait_s: float = inf
    ageing_s: float = 10.0
    preemption: Preemption = "auto"
    swap_ms_per_block: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_step_ms", "max_wait_s", "ageing_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be above 0.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, but must be at least "
                f"max_num_seqs, which is {self.max_num_seqs}: each running "
                "sequence gets a token in every step."
            )
