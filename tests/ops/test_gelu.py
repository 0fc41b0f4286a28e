"""GELU by tanh, against its formula in float64; and layer norm against its own."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from tiny_llm.ops.backend import use, works
from tiny_llm.ops.layer_norm import layer_norm
from tiny_llm.ops.swiglu import gelu

pytestmark = pytest.mark.parametrize("backend", ["ref", "mlx", *(["cpu"] if works() else [])])


def test_gelu_is_its_formula_at_any_size_and_rows_do_not_matter(backend: str) -> None:
    x = np.concatenate([np.linspace(-12, 12, 4001), [-1e4, -300, 0, 1e-30, 300, 1e6]]).astype(np.float32)
    wide = x.astype(np.float64)
    expected = wide / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    with use(backend):
        got = gelu(mx.array(x)[None])
        np.testing.assert_allclose(np.array(got[0]), expected, rtol=2e-6, atol=1e-6)
        rows = gelu(mx.repeat(mx.array(x)[None], 3, axis=0))
        assert all(mx.array_equal(row, got[0]).item() for row in rows)
        half = gelu(mx.array(x[:4001])[None].astype(mx.bfloat16))
    assert half.dtype == mx.bfloat16
    np.testing.assert_allclose(np.array(half[0].astype(mx.float32)), expected[:4001], rtol=0.02, atol=0.02)


def test_layer_norm_is_its_formula_and_rows_do_not_matter(backend: str) -> None:
    random = np.random.default_rng(0)
    x, weight, bias = random.normal(3, 2, (5, 77)), random.normal(size=77), random.normal(size=77)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias
    arrays = [mx.array(one.astype(np.float32)) for one in (x, weight, bias)]
    with use(backend):
        got = layer_norm(*arrays, 1e-5)
        np.testing.assert_allclose(np.array(got), expected, rtol=1e-4, atol=1e-5)
        for i in range(5):
            alone = layer_norm(arrays[0][i : i + 1], arrays[1], arrays[2], 1e-5)
            assert mx.array_equal(alone[0], got[i]).item()
        with pytest.raises(ValueError, match=r"\[layer_norm\] expected weight and bias \(77,\)"):
            layer_norm(arrays[0], arrays[1][:5], arrays[2], 1e-5)
