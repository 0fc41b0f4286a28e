"""A product with a quantized matrix as it lies in a checkpoint: by hand, weight by weight, all formats."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm.data import QuantizedTensor
from tiny_llm.ops.quantized_matmul import quantized_matmul

FORMATS = [(bits, group) for bits in (2, 4, 8) for group in (32, 64, 128)]
pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.chapter("2.3")]


def quantized(outputs: int, inputs: int, bits: int, group: int, seed: int = 0) -> QuantizedTensor:
    weight = mx.random.normal((outputs, inputs), key=mx.random.key(seed)) + 0.3
    return QuantizedTensor(*mx.quantize(weight, group_size=group, bits=bits), group, bits)


def numbers(weight: QuantizedTensor, *, high_first: bool = False) -> mx.array:
    """The q of each weight [O, I], one shift after the other; ``high_first`` reads words the wrong way."""
    per_word = 32 // weight.bits
    shifts = [weight.bits * (per_word - 1 - i if high_first else i) for i in range(per_word)]
    parts = [(weight.packed >> shift) & (2**weight.bits - 1) for shift in shifts]
    return mx.stack(parts, axis=-1).reshape(weight.packed.shape[0], -1).astype(mx.float32)


def dense(weight: QuantizedTensor, *, high_first: bool = False, **parts: mx.array) -> mx.array:
    """scale * q + bias of each weight [O, I], with other scales or biases if given."""
    scales, biases = parts.get("scales", weight.scales), parts.get("biases", weight.biases)
    wide = [mx.repeat(a, weight.group_size, axis=1) for a in (scales, biases)]
    return wide[0] * numbers(weight, high_first=high_first) + wide[1]


def test_by_hand() -> None:
    """q is 0, 1 ... 15, 0, 1 ... 15; scale 2 and bias -1. x looks at two of the weights."""
    words = mx.array([[0x76543210, 0xFEDCBA98] * 2], dtype=mx.uint32)
    weight = QuantizedTensor(words, mx.array([[2.0]]), mx.array([[-1.0]]), 32, 4)
    x = mx.zeros((1, 32))
    x[0, 3], x[0, 25] = 1.0, 10.0
    assert quantized_matmul(x, weight).tolist() == [[(2 * 3 - 1) + 10 * (2 * 9 - 1)]]


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_each_weight_by_itself(bits: int, group: int) -> None:
    weight = quantized(3, 2 * group, bits, group)
    got, expected = quantized_matmul(mx.eye(2 * group), weight).T, dense(weight)
    wrong = [(o, i) for o in range(3) for i in range(2 * group) if abs((got - expected)[o, i].item()) > 1e-5]
    values = [f"{a[wrong[0]].item():.4f}" for a in (got, expected)] if wrong else []
    first = (
        f"the first, output {wrong[0][0]} input {wrong[0][1]}, is {' and not '.join(values)}" if wrong else ""
    )
    assert not wrong, f"{len(wrong)} of {got.size} weights of {bits} bits are wrong; {first}"


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_the_definition(assert_close, bits: int, group: int) -> None:
    weight = quantized(5, 3 * group, bits, group)
    x = mx.random.normal((4, 3 * group), key=mx.random.key(1))
    first = mx.broadcast_to(weight.scales[:, :1], weight.scales.shape)
    assert_close(
        quantized_matmul(x, weight),
        x @ dense(weight).T,
        words_read_from_the_highest_bits_down=x @ dense(weight, high_first=True).T,
        no_bias=x @ dense(weight, biases=mx.zeros_like(weight.biases)).T,
        bias_once_a_group_and_not_once_a_weight=x @ dense(weight, biases=weight.biases / group).T,
        bias_added_before_scaling=x @ dense(weight, biases=weight.biases * weight.scales).T,
        every_group_with_the_first_one_s_scale=x @ dense(weight, scales=first).T,
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_do_not_know_of_each_other(bits: int) -> None:
    weight = quantized(7, 128, bits, 64)
    x = mx.random.normal((5, 128), key=mx.random.key(1))
    together = quantized_matmul(x, weight)
    for t in range(5):
        assert mx.array_equal(together[t : t + 1], quantized_matmul(x[t : t + 1], weight)).item(), f"row {t}"


def test_long_rows_keep_their_digits(assert_close) -> None:
    for bits in (4, 8):
        weight = quantized(3, 8192, bits, 64)
        x = mx.random.normal((1, 8192), key=mx.random.key(1)) + 1.0
        assert_close(quantized_matmul(x, weight), x @ dense(weight).T, tolerance=5e-6)


def test_no_rows() -> None:
    assert quantized_matmul(mx.zeros((0, 64)), quantized(3, 64, 4, 64)).tolist() == []
