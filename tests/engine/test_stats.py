"""The figures: quantiles out of counts."""

from __future__ import annotations

import pytest

from tiny_llm.engine.stats import Histogram


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
