"""What the ops' tests share: an assertion that names the likely mistake, and the golden activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

AssertClose = Callable[..., None]
Golden = Callable[[str], dict[str, mx.array]]


def distance(got: mx.array, expected: mx.array) -> float:
    """The largest difference, relative to the largest expected value."""
    scale = mx.max(mx.abs(expected.astype(mx.float32))).item() or 1.0
    return mx.max(mx.abs(got.astype(mx.float32) - expected.astype(mx.float32))).item() / scale


@pytest.fixture(scope="session")
def assert_close() -> AssertClose:
    """``assert_close(got, expected, mistake=its result, ...)``: a failure names the mistake that matches."""

    def check(got: mx.array, expected: mx.array, *, tolerance: float = 1e-5, **mistakes: mx.array) -> None:
        assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
        assert not mx.any(mx.isnan(got)).item(), "NaN: a row that sees no key, 0 / 0, or an overflow"
        off = distance(got, expected)
        for mistake, result in mistakes.items():
            assert distance(result, expected) > tolerance, f"this input cannot show {mistake!r}"
            hint = f"the result is that of a mistake: {mistake.replace('_', ' ')}"
            assert off <= tolerance or distance(got, result) > tolerance, hint
        assert off <= tolerance, f"off by {off:.2g} of the largest value, allowed {tolerance:g}"

    return check


@pytest.fixture(scope="session")
def activations(golden: Path) -> Golden:
    """``activations("qwen3")``: what transformers computed inside that golden model."""

    def load(case: str) -> dict[str, mx.array]:
        loaded = mx.load(str(golden / case / "activations.safetensors"))
        assert isinstance(loaded, dict)
        return loaded

    return load
