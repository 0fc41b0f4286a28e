"""Owns how long a step will take: guessed from the model's own work, corrected by the steps before.

A step costs: so much for itself (the weights are read once), for each decode and each token of
context it looks back on, for each token of a chunk and each of its context. How these five compare is
given at the start, from the model's size; the first step says how fast the machine is. From then on each
step corrects them by a Kalman filter over their logarithms (Kalman 1960): an error is laid on the costs
that are doubted most and had most to do with it, and what has been measured often is doubted little.
A guess is the mean and its deviation, so that first chunks are small. Reads no clock: times are told.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import exp, inf, log, sqrt
from operator import mul
from typing import TypeAlias

from tiny_llm.data import Plan, StepCosts, hidden_pairs

UNKNOWN_MODEL = StepCosts(step=1.0, decode=1.0, decode_context=1e-5, chunk=1.0, chunk_context=5e-4)
"""How costs compare where no model says it: a token takes no longer than the step that it is in."""
_NOISE = 0.1  # of a step's time is chance
_DRIFT, _CHANGE = 0.01, 0.3  # of a cost may change from step to step; and where a step is far from its guess
_FAR = 3.0  # deviations
_ENOUGH = 16  # steps of decodes alone in a row, after which one in so many is looked at
_INSTANT = 1e-3  # milliseconds: the least that a clock is believed
_MOST = log(2.0)  # of a change that one step is believed: it may be a hiccup, else the next will say the same
_ROUNDS = 3  # of Newton's method
Work: TypeAlias = tuple[float, float, float, float, float]
"""How often each of the five costs is there: (1, decodes, their context, a chunk's tokens, their context)."""
_NOTHING: Work = (0.0, 0.0, 0.0, 0.0, 0.0)
# How far off the costs may be at the start, as covariances of their logarithms: each by itself, and the two
# of a chunk together, as one arithmetic does both.
_OWN, _TOGETHER = 1.25, 1.0
_UNSURE = {(i, i): _OWN for i in range(5)} | {(3, 4): _TOGETHER, (4, 3): _TOGETHER}


class StepTime:
    """Milliseconds of a step, in five costs. ``costs`` are the guess before the first step, in any unit.

    ``windows`` are theirs: what a window hides is no context.
    """

    def __init__(self, costs: StepCosts = UNKNOWN_MODEL) -> None:
        self._is_measured = False
        self._without_chunk = 0  # steps since the last one with a chunk
        self.windows = costs.windows
        self._costs = list(costs[:5])
        self._doubts = [[_UNSURE.get((i, j), 0.0) for i in range(5)] for j in range(5)]  # covariances

    def observe(self, plan: Plan, ms: float) -> None:
        """A step took ``ms``."""
        rows = plan.decodes + plan.drafted
        work = (1.0, rows, plan.decode_context, plan.chunk_tokens, plan.chunk_context)
        parts = list(map(mul, self._costs, work))
        expected = sum(parts)
        if not self._is_measured:
            self._is_measured = True
            self._costs = [cost * max(ms, _INSTANT) / expected for cost in self._costs]
            return
        error = log(max(ms, _INSTANT) / expected)
        self._without_chunk = 0 if plan.chunk_tokens else self._without_chunk + 1
        # Steps of decodes alone come by the thousand and say the same, and the filter takes its time.
        tells_nothing = self._without_chunk > _ENOUGH and abs(error) < _NOISE
        if tells_nothing and self._without_chunk % _ENOUGH:
            return
        self._correct([part / expected for part in parts], error)

    def _correct(self, shares: list[float], error: float) -> None:
        """The logarithm of a step's time was off by ``error``; each cost had its share in the guess."""
        blame = [_dot(row, shares) for row in self._doubts]
        variance = _dot(blame, shares) + _NOISE**2
        gain = min(1.0, _MOST / max(abs(error), _MOST)) / variance
        changes = [max(-_MOST, min(_MOST, gain * error * part)) for part in blame]
        self._costs = [cost * exp(change) for cost, change in zip(self._costs, changes, strict=True)]
        for row, part in zip(self._doubts, blame, strict=True):  # what was measured is doubted less
            weight = gain * part
            row[:] = [doubt - weight * other for doubt, other in zip(row, blame, strict=True)]
        self._drift(shares, _CHANGE if abs(error) > _FAR * sqrt(variance) else _DRIFT)

    def _drift(self, shares: list[float], change: float) -> None:
        """What a step had to do with may have changed by about ``change`` since: doubt it so much more."""
        doubts = self._doubts
        live = [share > 0 and doubts[i][i] < _OWN for i, share in enumerate(shares)]
        for (i, j), unsure in _UNSURE.items():
            if live[i] and live[j]:
                doubts[i][j] += change * change * unsure

    def decode_ms(self, decodes: int, context: int) -> float:
        """A step of ``decodes`` sequences with ``context`` tokens before them, and nothing else."""
        work = (1.0, decodes, context, 0.0, 0.0)
        return _dot(self._costs, work) + sqrt(self._doubt_of(work)[0])

    def row_ms(self) -> float:
        """What one more row of a decode adds to a step, its context's keys and values being read anyway."""
        return self._costs[1]

    def chunk_ms(self, start: int, tokens: int) -> float:
        """What ``tokens`` tokens from position ``start`` on add to a step."""
        doubt = self._doubt_of(_NOTHING, self.context(start, 1))[2]  # rather too much than too little
        return (self._costs[3] + sqrt(doubt)) * tokens + self._costs[4] * self.context(start, tokens)

    def tokens_within(self, ms: float, start: int, beside: Work = _NOTHING) -> float:
        """How many tokens from position ``start`` on a step of ``ms`` has room for, ``beside`` what it does.

        What is measured is the sum: much of what its parts are doubted by cancels in it. So the doubt is that
        of the whole step. It is less than its parts' together, from which Newton's method sets out.
        """
        if ms == inf:
            return inf
        start, left = self.context(start, 1), ms - _dot(self._costs, beside)
        token, look = self._costs[3] + self._costs[4] * start, self._costs[4]
        own, both, more = self._doubt_of(beside, start)
        count = root_of(token + sqrt(more), look, max(0.0, left - sqrt(own)))
        for _ in range(_ROUNDS):  # its deviation, at so many tokens, by a line
            doubt = sqrt(max(own + count * (2 * both + count * more), 0.0))
            if doubt == 0.0:
                break
            slope = max((both + count * more) / doubt, -token / 2)
            count = root_of(token + slope, look, max(0.0, left - doubt + slope * count))
        return count

    def context(self, start: int, tokens: int) -> int:
        """The tokens that each of ``tokens`` tokens from position ``start`` on sees before it, summed."""
        hidden = sum([share * hidden_pairs(window, start, tokens) for window, share in self.windows])
        return context_of(start, tokens) - round(hidden)

    def _doubt_of(self, beside: Work, seen: int = 0) -> tuple[float, float, float]:
        """The variances of that and of a chunk's token with ``seen`` before it; between, their covariance."""
        token, look = self._costs[3], self._costs[4] * seen
        of_token, of_look = self._doubts[3], self._doubts[4]
        own = token * (token * of_token[3] + 2 * look * of_token[4]) + look * look * of_look[4]
        if beside is _NOTHING:
            return 0.0, 0.0, max(0.0, own)
        parts = list(map(mul, self._costs, beside))
        blame = [_dot(row, parts) for row in self._doubts]
        return max(0.0, _dot(blame, parts)), blame[3] * token + blame[4] * look, max(0.0, own)


def context_of(start: int, tokens: int) -> int:
    """The tokens before each of ``tokens`` tokens from position ``start`` on, summed."""
    return tokens * start + tokens * (tokens - 1) // 2


def root_of(linear: float, look: float, ms: float) -> float:
    """The n of ``linear * n + look * n * n / 2 = ms``, solved without cancelling."""
    return 2 * ms / (linear + sqrt(linear * linear + 2 * look * ms)) if ms else 0.0


def _dot(a: Iterable[float], b: Iterable[float]) -> float:
    return sum(map(mul, a, b), 0.0)
