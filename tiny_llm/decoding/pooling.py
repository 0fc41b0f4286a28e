"""Owns how a text's hidden states become its vector, chunk by chunk, and which rows of a step it needs.

Its bits do not depend on how the text was cut, nor on what else is in a step.
Source: sentence-transformers' modules Pooling and Normalize.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from tiny_llm.data import Plan
from tiny_llm.sampling_params import PoolingParams


@dataclass(slots=True, eq=False)
class Pool:
    """What is ``gathered`` [E], in float32, from ``tokens`` hidden states of a text that has ``length``."""

    params: PoolingParams
    length: int
    tokens: int = 0
    gathered: mx.array | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is the text's vector."""
        return self.tokens == (self.length if self.params.reads_prompt else 1)

    def missing(self, end: int) -> int:
        """How many it lacks of the tokens before ``end``, or just of the last: what it has may come again."""
        return max(0, end - self.tokens) if self.params.reads_prompt else int(end == self.length)

    def take(self, states: mx.array) -> None:
        """Take in the hidden states [n, E] that follow."""
        states = states.astype(mx.float32)
        self.tokens += states.shape[0]
        if self.gathered is not None:
            states = mx.concatenate([self.gathered[None], states])
        # On a CPU a sum adds one row after the other: it does not matter where a chunk ends.
        state = mx.cumsum(states, axis=0, stream=mx.cpu)[-1] if self.params.reads_prompt else states[-1]
        if self.is_whole:
            state = (state / self.tokens)[: self.params.dimensions]
            if self.params.normalize:
                state = state / mx.maximum(mx.linalg.norm(state), 1e-12)
        self.gathered = state

    def vector(self) -> array[float]:
        """What it has, as numbers."""
        return array("f", [] if self.gathered is None else memoryview(self.gathered))  # type: ignore[arg-type]


class PooledRows(NamedTuple):
    """Rows of a step whose hidden states go to the ``pool`` of a sequence."""

    seq_id: int
    pool: Pool
    rows: range


def pooled_rows(plan: Plan, pool_of: Callable[[int], Pool | None]) -> list[PooledRows]:
    """What is to be pooled of a step."""
    found, end = list[PooledRows](), 0
    for item in plan.items:
        end += len(item.tokens)
        pool = None if item.logit_rows else pool_of(item.seq_id)
        if pool is not None and (missing := pool.missing(item.start + len(item.tokens))):
            found.append(PooledRows(item.seq_id, pool, range(end - missing, end)))
    return found


def gather(pooled: Sequence[PooledRows], states: mx.array) -> None:
    """Let each pool take its rows of ``states`` [P, E], which are all of theirs, one after the other."""
    at = 0
    for _, pool, rows in pooled:
        pool.take(states[at : at + len(rows)])
        at += len(rows)
