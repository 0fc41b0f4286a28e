"""What the ops' tests share: where Metal's run, an assertion that names the mistake, golden activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.metalsim.build import why_not
from tiny_llm.ops.backend import use

AssertClose = Callable[..., None]
Off = Callable[[mx.array, mx.array], float]
GPUS = ["metal"] if mx.metal.is_available() else []
Golden = Callable[[str], dict[str, mx.array]]


@pytest.fixture(params=["metalsim", *GPUS])
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every op of a test that uses this runs as Metal: simulated, and on a GPU if there is one."""
    if request.param == "metalsim" and (reason := why_not()):
        pytest.skip(reason)
    with use(request.param) as name:
        yield name


@pytest.fixture(scope="session")
def assert_close(off: Off) -> AssertClose:
    """``assert_close(got, expected, mistake=its result, ...)``: a failure names the mistake that matches."""

    def check(got: mx.array, expected: mx.array, *, tolerance: float = 1e-5, **mistakes: mx.array) -> None:
        error = off(got, expected)
        assert not mx.any(mx.isnan(got)).item(), "NaN: a row that sees no key, 0 / 0, or an overflow"
        for mistake, result in mistakes.items():
            assert off(result, expected) > tolerance, f"this input cannot show {mistake!r}"
            hint = f"the result is that of a mistake: {mistake.replace('_', ' ')}"
            assert error <= tolerance or off(got, result) > tolerance, hint
        assert error <= tolerance, f"off by {error:.2g} of the largest value, allowed {tolerance:g}"

    return check


@pytest.fixture(scope="session")
def activations(golden: Path) -> Golden:
    """``activations("qwen3")``: what transformers computed inside that golden model."""

    def load(case: str) -> dict[str, mx.array]:
        loaded = mx.load(str(golden / case / "activations.safetensors"))
        assert isinstance(loaded, dict)
        return loaded

    return load
