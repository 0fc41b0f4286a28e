"""Random weights: the shapes, formats and sizes of real ones, and numbers that a model survives."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm.config import Quantization
from tiny_llm.data import QuantizedTensor
from tiny_llm.weights.dummy import dummy_weights

SHAPES = {"table": (300, 256), "odd": (40, 80), "norm": (256,)}
MATRICES = ("table", "odd")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_floats(dtype: mx.Dtype) -> None:
    weights = dummy_weights(SHAPES, dtype=dtype, quantize=None, quantizable=MATRICES)
    assert list(weights) == list(SHAPES)
    for name, array in weights.items():
        assert isinstance(array, mx.array)
        assert (array.shape, array.dtype) == (SHAPES[name], dtype)
    assert mx.array_equal(weights["norm"], mx.ones(256, dtype))
    assert mx.std(weights["table"].astype(mx.float32)).item() == pytest.approx(1 / 16, rel=0.02)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(bits: int) -> None:
    quantize = Quantization(bits, 64)
    weights = dummy_weights(SHAPES, dtype=mx.bfloat16, quantize=quantize, quantizable=MATRICES)
    table = weights["table"]
    assert isinstance(table, QuantizedTensor)
    real = mx.quantize(mx.zeros((300, 256), mx.bfloat16), group_size=64, bits=bits)
    for array, like in zip((table.packed, table.scales, table.biases), real, strict=True):
        assert (array.shape, array.dtype) == (like.shape, like.dtype)
    values = mx.dequantize(table.packed, table.scales, table.biases, group_size=64, bits=bits)
    assert mx.std(values.astype(mx.float32)).item() == pytest.approx(1 / 16, rel=0.05)
    assert abs(mx.mean(values.astype(mx.float32)).item()) < 1e-3
    for shift in (0, 28):
        for value in (0, 15):
            share = mx.mean(mx.bitwise_and(table.packed >> shift, 15) == value).item()
            assert share == pytest.approx(1 / 16, rel=0.1), "every value must be drawn"
    assert isinstance(weights["odd"], mx.array), "no group divides 80"


def test_rows_differ() -> None:
    weights = dummy_weights({"x": (20_000, 64)}, dtype=mx.float32, quantize=None, quantizable=())
    x = weights["x"]
    assert isinstance(x, mx.array)
    assert not mx.any(mx.all(x[1:] == x[:-1], axis=1)).item()
    assert not mx.array_equal(x[0], x[2**14]), "the noise begins anew on a row's border"
