"""Owns what ``bench --fit`` measures: how long steps of many kinds take here, as costs that predict them.

The costs are those of ``simulation.costs``, none below zero, chosen for the least squares of relative errors.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from operator import add

from tiny_llm.config import ModelFacts
from tiny_llm.data import Plan
from tiny_llm.engine.engine import Engine
from tiny_llm.engine.trace import Trace
from tiny_llm.planning.simulation.costs import ROWS, StepMs
from tiny_llm.sampling_params import SamplingParams

_TOGETHER, _ALONE, _MIXED = (1, 2, 4, 8, 16, 32), (8, 16, 32, 64, 128, 256, 512), 8
_SHORT, _LONG, _FEW, _TOKENS = 16, 256, 4, 8  # contexts; how many have long ones; tokens of each
_SWEEPS = 3000
_KINDS = len(ROWS) + 3  # of costs


class StepSamples(Trace):
    """What steps were made of, and their milliseconds.

    Decodes in a row are one sample: each is launched while the one before it runs, so that the first has a
    part of the second in its time and the last has too little, but together they have what they took.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[list[float], float]] = []
        self._in_a_row = False

    def step(self, plan: Plan, began: float, ended: float) -> None:
        """Look at a step, and keep nothing else of it."""
        rows = plan.decodes + plan.drafted + plan.chunk_tokens
        logits = sum(item.logit_rows for item in plan.items)
        work = [*_hats(rows), float(logits), float(plan.decode_context), float(plan.chunk_context)]
        ms, goes_on = (ended - began) * 1e3, self._in_a_row and not plan.chunk_tokens
        if goes_on:
            before, before_ms = self.kept.pop()
            work, ms = list(map(add, work, before)), ms + before_ms
        self.kept.append((work, ms))
        self._in_a_row = not plan.chunk_tokens


def fit_steps(engine: Engine, config: ModelFacts, what: str) -> StepMs:
    """Measure steps of an idle engine: decodes of few and many, prompts alone, and both together."""
    chance, samples = random.Random(0), StepSamples()
    room = engine.settings.kv_blocks * engine.settings.block_size
    longest = min(room, config.max_position_embeddings) - 1

    def serve(lengths: Sequence[tuple[int, int]]) -> None:
        for prompt, answer in lengths:
            ids = [chance.randrange(config.vocab_size) for _ in range(prompt)]
            engine.add(ids, SamplingParams(max_tokens=answer, ignore_eos=True, speculate=False))
        while len(engine):
            engine.step()

    serve([(64, 8)] * 2)  # warms up
    before, engine.trace = engine.trace, samples
    for count in _TOGETHER:
        serve([(_SHORT, _TOKENS)] * count)
        if count <= _FEW:
            serve([(_LONG, _TOKENS)] * count)
    for tokens in _ALONE:
        serve([(min(tokens, longest), 1)])
    serve([(chance.randrange(16, 256), chance.randrange(4, 32)) for _ in range(_MIXED)])
    engine.trace = before
    *rows_ms, logits, decode_context, chunk_context = _least_squares(samples.kept)
    token_bytes = engine.block_bytes // engine.settings.block_size
    return StepMs(what, ROWS, rows_ms, logits, decode_context, chunk_context, token_bytes, room)


def _hats(rows: int) -> list[float]:
    """What part of ``rows`` each of ROWS has: two neighbours share it, as in ``StepMs.ms``."""
    shares = [0.0] * len(ROWS)
    at = next((i for i, more in enumerate(ROWS) if more > rows), len(ROWS) - 1) or 1
    part = (rows - ROWS[at - 1]) / (ROWS[at] - ROWS[at - 1])
    shares[at - 1], shares[at] = 1 - part, part
    return shares


def _least_squares(samples: Sequence[tuple[list[float], float]]) -> list[float]:
    """Costs of zero or more, each in turn set to what suits the others best; what was never met, to follow.

    Source: non-negative least squares by coordinate descent (Franc et al. 2005).
    """
    scaled = [[part / ms for part in work] for work, ms in samples]
    product = [[sum(row[i] * row[j] for row in scaled) for j in range(_KINDS)] for i in range(_KINDS)]
    wanted, costs = [sum(row[i] for row in scaled) for i in range(_KINDS)], [0.0] * _KINDS
    for _ in range(_SWEEPS):
        for i, row in enumerate(product):
            if row[i]:
                rest = wanted[i] - sum(part * cost for part, cost in zip(row, costs, strict=True))
                costs[i] = max(0.0, costs[i] + rest / row[i])
    for i in range(1, len(ROWS)):  # more rows never take less time; past the last that was met, in proportion
        if product[i][i]:
            costs[i] = max(costs[i], costs[i - 1])
        else:
            costs[i] = costs[i - 1] * ROWS[i] / ROWS[i - 1]
    return costs
