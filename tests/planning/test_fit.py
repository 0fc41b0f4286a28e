"""Costs that were fitted predict the steps that they were fitted to; an engine is left as it was."""

from __future__ import annotations

import random

import pytest

from tiny_llm.engine.llm import LLM
from tiny_llm.planning import fit
from tiny_llm.planning.fit import StepSamples, fit_steps
from tiny_llm.planning.simulation.costs import ROWS, StepMs


def test_known_costs_are_found_again() -> None:
    known = StepMs("", ROWS, [3.0 + 0.4 * rows for rows in ROWS], 0.2, 2e-3, 1e-3, 1, 1)
    chance, samples = random.Random(0), []
    for _ in range(200):
        rows, logits = chance.randrange(1, 1000), chance.randrange(1, 20)
        context, chunk = chance.randrange(5000), chance.randrange(5000)
        work = [*fit._hats(rows), float(logits), float(context), float(chunk)]
        samples.append((work, known.ms(rows, logits, context, chunk)))
    costs = fit._least_squares(samples)
    for work, ms in samples:
        assert sum(part * cost for part, cost in zip(work, costs, strict=True)) == pytest.approx(ms, rel=0.02)


def test_the_engine_s_steps_are_measured_and_its_trace_is_given_back() -> None:
    llm = LLM("demo")
    with llm:
        costs = fit_steps(llm.engine, llm.config, "the bundled model")
        assert llm.engine.trace is None and not len(llm.engine)
        assert costs.kv_token_bytes * llm.engine.settings.block_size == llm.engine.block_bytes
    assert costs.ms(1, 1, 16, 0) > 0
    assert all(less <= more for less, more in zip(costs.rows_ms, costs.rows_ms[1:], strict=False))
    assert not StepSamples().kept
