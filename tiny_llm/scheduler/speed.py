"""Owns how long a step will take, learnt from the steps before. Reads no clock: times are told.

A step costs: so much for itself (the weights are read once), for each decode and each token of
context it looks back on, for each token of a chunk and each of its context. The five costs
are corrected after each step in proportion to what each had to do with it (normalised least mean
squares; Widrow and Hoff 1960). Of three steps the middle one is believed, so that one hiccup
changes nothing; being too slow is corrected sooner than too quick, to be on a bound's safe side.
"""

from __future__ import annotations

from collections import deque
from math import inf, sqrt

from tiny_llm.data import Plan

_TYPICAL = (1.0, 16.0, 16_384.0, 256.0, 131_072.0)  # brings the five quantities to one scale
_UP, _DOWN = 0.5, 0.2  # how much of an error is corrected at once


class StepTime:
    """Milliseconds of a step, in five costs. ``largest_chunk`` is the most chunk tokens a step has had."""

    def __init__(self) -> None:
        self.largest_chunk = 16
        self._costs = [0.0] * len(_TYPICAL)  # ms for the typical amount of each
        self._ratios: deque[float] = deque((1.0, 1.0, 1.0), maxlen=3)  # taken / expected, of the last steps

    def observe(self, plan: Plan, ms: float) -> None:
        """A step took ``ms``."""
        amounts = _amounts(plan)
        expected = sum(c * a for c, a in zip(self._costs, amounts, strict=True))
        if expected:
            self._ratios.append(ms / expected)
            error = expected * (sorted(self._ratios)[1] - 1)
            error *= _UP if error > 0 else _DOWN
        else:
            error = ms
        share = error / sum(a * a for a in amounts)
        self._costs = [max(0.0, c + share * a) for c, a in zip(self._costs, amounts, strict=True)]
        self.largest_chunk = max(self.largest_chunk, plan.chunk_tokens)

    def decode_ms(self, decodes: int, context: int) -> float:
        """A step of ``decodes`` sequences with ``context`` tokens before them, and nothing else."""
        base, row, look, _, _ = self._each()
        return base + row * decodes + look * context

    def chunk_ms(self, start: int, tokens: int) -> float:
        """What ``tokens`` tokens from position ``start`` on add to a step."""
        _, _, _, token, look = self._each()
        return token * tokens + look * context_of(start, tokens)

    def tokens_within(self, ms: float, start: int) -> float:
        """How many tokens from position ``start`` on add ``ms`` to a step; infinity if that is not known."""
        _, _, _, token, look = self._each()
        ms = max(0.0, ms)
        linear = token + look * start  # linear * n + look * n * n / 2 = ms, solved without cancelling
        slope = linear + sqrt(linear * linear + 2 * look * ms)
        return 2 * ms / slope if 0 < slope < inf else inf

    def _each(self) -> list[float]:
        return [cost / typical for cost, typical in zip(self._costs, _TYPICAL, strict=True)]


def context_of(start: int, tokens: int) -> int:
    """The tokens before each of ``tokens`` tokens from position ``start`` on, summed."""
    return tokens * start + tokens * (tokens - 1) // 2


def _amounts(plan: Plan) -> list[float]:
    work = (1, plan.decodes, plan.decode_context, plan.chunk_tokens, plan.chunk_context)
    return [amount / typical for amount, typical in zip(work, _TYPICAL, strict=True)]
