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

    A step has at most ``max_step_tokens`` tokens, of at most ``max_running`` sequences. While
    sequences decode, chunks of prompts are sized for the step to take ``max_step_ms``.
    At most ``max_waiting`` new requests wait, each at most ``max_wait_s`` seconds.
    One level of priority is worth ``ageing_s`` seconds of waiting. ``preemption`` says how a
    sequence makes room for others; "auto" takes the cheaper way, given what a block's way
    to the host and back takes (``swap_ms_per_block``; None: the engine measures it).

    Raises ConfigError for a value that cannot work.
    """

    max_running: int = 256
    max_step_tokens: int = 2048
    max_step_ms: float = 100.0
    max_waiting: int = 1024
    max_wait_s: float = inf
    ageing_s: float = 10.0
    preemption: Preemption = "auto"
    swap_ms_per_block: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_running", "max_step_tokens", "max_step_ms", "max_wait_s", "ageing_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be above 0.")
        if self.max_step_tokens < self.max_running:
            raise ConfigError(
                f"max_step_tokens is {self.max_step_tokens}, but must be at least max_running, "
                f"which is {self.max_running}: each running sequence gets a token in every step."
            )
