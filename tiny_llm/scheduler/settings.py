"""Owns what an operator may set about scheduling, and checks it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

from tiny_llm.errors import ConfigError
from tiny_llm.limits import check_number, check_whole

Preemption = Literal["auto", "recompute", "swap"]
MAX_PRIORITY = 100
MAX_NUM_SEQS = 10**6
MAX_NUM_BATCHED_TOKENS = 2048
"""Unless an operator says otherwise: a GPU's or a core's work for a good while, and little memory."""


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """Bounds and policies.

    A step has at most ``max_num_batched_tokens`` tokens, of at most ``max_num_seqs`` sequences. While
    sequences decode, chunks of prompts are sized for the step to take ``max_step_ms``. Where the decodes
    alone take as long, prompts still move on, by up to 8 tokens a step, or as few as add half of that time.
    At most ``max_queued_requests`` wait beyond those that could run at once, each at most ``max_wait_s``
    seconds; a request counts as often as it has answers.
    One level of priority is worth ``ageing_s`` seconds of waiting. ``preemption`` says how a
    sequence makes room for others; "auto" takes the cheaper way, given what a block's way
    to the host and back takes (``swap_ms_per_block``; None: the engine measures it).

    Raises ConfigError for a value that cannot work.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
    max_step_ms: float = 100.0
    max_queued_requests: int = 1024
    max_wait_s: float = inf
    ageing_s: float = 10.0
    preemption: Preemption = "auto"
    swap_ms_per_block: float | None = None

    def __post_init__(self) -> None:
        check_whole("max_num_seqs (--max-concurrent)", self.max_num_seqs, most=MAX_NUM_SEQS)
        check_whole("max_num_batched_tokens", self.max_num_batched_tokens)
        check_whole("max_queued_requests (--max-queue)", self.max_queued_requests, least=0)
        check_number("max_step_ms (--max-step-ms)", self.max_step_ms, most=inf)
        check_number("max_wait_s (--max-wait)", self.max_wait_s, most=inf)
        check_number("ageing_s", self.ageing_s)
        if self.swap_ms_per_block is not None:
            check_number("swap_ms_per_block", self.swap_ms_per_block, zero=True, most=inf)
        if self.preemption not in get_args(Preemption):
            ways = ", ".join(map(repr, get_args(Preemption)))
            raise ConfigError(f"preemption is {self.preemption!r}, but must be one of {ways}.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, but must be at least "
                f"max_num_seqs, which is {self.max_num_seqs}: each running "
                "sequence gets a token in every step."
            )
