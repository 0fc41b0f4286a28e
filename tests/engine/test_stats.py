"""The figures: quantiles out of counts."""

from __future__ import annotations

import pytest

from tiny_llm.engine.llm import LLM
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.engine.stats import Histogram
from tiny_llm.sampling_params import SamplingParams


def test_quantiles_lie_between_the_bounds_that_hold_them() -> None:
    histogram = Histogram((1.0, 2.0, 4.0))
    for value in (0.5, 1.5, 1.5, 3.0):
        histogram.add(value)
    assert histogram.quantile(0.25) == 1.0
    assert histogram.quantile(0.5) == pytest.approx(1.5)
    assert histogram.quantile(1.0) == 4.0
    assert histogram.mean() == pytest.approx(6.5 / 4)


def test_nothing_and_what_is_beyond_all_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    assert histogram.summary() == {"count": 0, "mean": 0.0, "p50": 0.0, "p95": 0.0, "p99": 0.0}
    histogram.add(100.0)
    assert histogram.quantile(0.5) == 2.0, "no more is known than that it is above the last bound"


def test_counts_of_the_prefix_cache_outlive_what_it_held(llm: LLM) -> None:
    """An empty cache was taken for none: after a rest, /metrics and the page told of no hit and no query."""
    own = llm.with_engine(EngineSettings(kv_blocks=64))
    for _ in range(2):
        own.generate([[7] * 100], SamplingParams(max_tokens=2))
    before = own.engine.stats()
    assert before.prefix_hit_tokens > 0
    own.engine.rest()
    after = own.engine.stats()
    assert after.blocks.cached == 0, "the case: nothing is cached any more"
    assert after.prefix_hit_tokens == before.prefix_hit_tokens
    assert after.prefix_miss_tokens == before.prefix_miss_tokens
