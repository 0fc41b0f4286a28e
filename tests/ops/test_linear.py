"""The linear map, dense and quantized."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm.data import QuantizedTensor
from tiny_llm.ops.linear import gated, linear, linear_ref, linears
from tiny_llm.ops.quantized_matmul import quantized_matmul
from tiny_llm.ops.swiglu import swiglu_ref


def quantized(weight: mx.array, bits: int, group_size: int) -> QuantizedTensor:
    return QuantizedTensor(*mx.quantize(weight, group_size=group_size, bits=bits), group_size, bits)


@pytest.mark.chapter("1.4")
def test_by_hand() -> None:
    """The weight lies as [outputs, inputs], so it is used transposed."""
    got = linear(
        mx.array([[1.0, 2.0]]), mx.array([[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]), mx.array([0.0, 10.0, 0.0])
    )
    assert got.tolist() == [[11.0, 27.0, 23.0]]
    square = mx.array([[1.0, 2.0], [3.0, 4.0]])
    assert linear(mx.array([[1.0, 10.0], [0.0, 1.0]]), square).tolist() == [[21.0, 43.0], [2.0, 4.0]]
    assert linear(mx.array([[1.0, 10.0]]), square, mx.array([0.5, 0.25])).tolist() == [[21.5, 43.25]]
    half = linear_ref(*(one.astype(mx.bfloat16) for one in (square, square)))
    assert half.dtype == mx.bfloat16, "the result has x's dtype"


@pytest.mark.chapter("1.4")
def test_a_transposed_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a weight \[O, 2\] for x \(1, 2\), got \(2, 3\)"):
        linear(mx.zeros((1, 2)), mx.zeros((2, 3)))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_quantized_is_the_product_with_the_unpacked_matrix(assert_close, bits: int, group_size: int) -> None:
    keys = mx.random.split(mx.random.key(bits), 3)
    x, bias = mx.random.normal((3, 128), key=keys[0]), mx.random.normal((24,), key=keys[1])
    weight = quantized(mx.random.normal((24, 128), key=keys[2]), bits, group_size)
    unpacked = mx.dequantize(weight.packed, weight.scales, weight.biases, group_size=group_size, bits=bits)
    assert_close(linear(x, weight, bias), mx.matmul(x, unpacked.T) + bias)


def test_quantized_bfloat16_is_summed_in_float32(assert_close) -> None:
    x = mx.random.normal((2, 2048), key=mx.random.key(0)).astype(mx.bfloat16)
    weight = quantized(mx.random.normal((8, 2048), key=mx.random.key(1)).astype(mx.bfloat16), 4, 64)
    unpacked = mx.dequantize(
        weight.packed, weight.scales.astype(mx.float32), weight.biases.astype(mx.float32)
    )
    got = quantized_matmul(x, weight)
    assert got.dtype == mx.bfloat16
    assert_close(got, mx.matmul(x.astype(mx.float32), unpacked.T), tolerance=2**-8)


def test_a_quantized_matrix_of_other_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[quantized_matmul\] expected x of 64 columns, got \(1, 32\)"):
        linear(mx.zeros((1, 32)), quantized(mx.zeros((4, 64)), 4, 32))


def test_several_maps_of_one_x(assert_close) -> None:
    """Some quantized, some not, some with a bias: as each alone."""
    x, dense, other = (mx.random.normal((5, 64), key=key) for key in mx.random.split(mx.random.key(0), 3))
    weights = [dense, quantized(other, 4, 32), other]
    biases = [None, mx.arange(5.0), mx.ones(5)]
    got = linears(x, weights, biases)
    for y, weight, bias in zip(got, weights, biases, strict=True):
        assert_close(y, linear(x, weight, bias))
    with pytest.raises(ValueError):
        linears(x, weights, biases[:2])


def test_a_gated_pair(assert_close) -> None:
    x, gate, up = (mx.random.normal((6, 32), key=key) for key in mx.random.split(mx.random.key(1), 3))
    bias = mx.arange(6.0)
    assert_close(
        gated(x, gate, up, bias, None),
        swiglu_ref(x @ gate.T + bias, x @ up.T),
        gate_and_up_swapped=swiglu_ref(x @ up.T, x @ gate.T + bias),
        the_bias_is_on_up=swiglu_ref(x @ gate.T, x @ up.T + bias),
    )
