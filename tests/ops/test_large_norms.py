"""Qwen3's norms have weights of up to 96.5: the quotient is rounded before the product, as in transformers.

A kernel that multiplies in float32 and rounds once is off by a step of bfloat16 in a quarter of all entries.
tests/golden/large_norms.safetensors is transformers' own.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.ops.backend import use, works
from tiny_llm.ops.rms_norm import add_rms_norm, rms_norm
from tiny_llm.ops.rope import rope_qk

EPS = 1e-6


@pytest.fixture
def theirs(golden: Path) -> dict[str, mx.array]:
    found = mx.load(str(golden / "large_norms.safetensors"))
    assert isinstance(found, dict)
    return found


@pytest.fixture(params=["ref", "cpu", "mlx", "metalsim"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and not works():
        pytest.skip("the CPU kernels were not built: no C++ compiler")
    return str(request.param)


def ways(x: mx.array, weight: mx.array) -> dict[str, mx.array]:
    """The same norm by each op that has one in it; positions are 0, so that nothing is turned."""
    rows, width = x.shape
    zeros, still = mx.zeros((rows,), mx.int32), mx.zeros((width // 2,))
    heads = x.reshape(rows, 1, width)
    q, k = rope_qk(heads, heads, zeros, still, weight, weight, EPS)
    return {
        "rms_norm": rms_norm(x, weight, EPS),
        "add_rms_norm": add_rms_norm(x, mx.zeros_like(x), weight, EPS)[1],
        "queries": q.reshape(x.shape),
        "keys": k.reshape(x.shape),
    }


def test_qwen3_with_norm_weights_of_96_5(backend: str, theirs: dict[str, mx.array]) -> None:
    x, weight, expected = theirs["x"], theirs["weight"], theirs["bfloat16"]
    assert mx.max(weight).item() == 96.5
    with use(backend):
        if backend != "cpu":  # whose kernels are of float32: other dtypes fall back to ref
            for op, got in ways(x, weight).items():
                assert got.dtype == mx.bfloat16
                differ = mx.sum(got != expected).item()
                assert differ <= 2, (
                    f"{op} differs in {differ} of {x.size}: its quotient must be rounded first"
                )
        for op, got in ways(x.astype(mx.float32), weight.astype(mx.float32)).items():
            error = mx.max(mx.abs(got - theirs["float32"])).item()
            assert error < 1e-4, f"{op} in float32 is off by {error}, of up to 270"


def test_the_file_would_show_it(theirs: dict[str, mx.array]) -> None:
    """Rounding once gives other numbers in many entries."""
    differ = mx.sum(theirs["float32"].astype(mx.bfloat16) != theirs["bfloat16"]).item()
    assert differ > theirs["x"].size / 5
