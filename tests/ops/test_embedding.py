"""The embedding: rows by id, dense and quantized."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm.data import QuantizedTensor
from tiny_llm.ops.embedding import embedding

pytestmark = pytest.mark.chapter("1.5")


def test_rows_by_id() -> None:
    table = mx.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    assert embedding(mx.array([2, 0, 2]), table).tolist() == [[4, 5], [0, 1], [4, 5]]


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_quantized_rows_are_those_of_the_unpacked_table(bits: int) -> None:
    table = mx.random.normal((10, 64), key=mx.random.key(0))
    packed = QuantizedTensor(*mx.quantize(table, group_size=32, bits=bits), 32, bits)
    unpacked = mx.dequantize(packed.packed, packed.scales, packed.biases, group_size=32, bits=bits)
    tokens = mx.array([7, 7, 0])
    assert mx.array_equal(embedding(tokens, packed), unpacked[tokens])


def test_tokens_that_are_no_ids_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"\[embedding\] expected integer tokens \[T\], got mlx.core.float32"
    ):
        embedding(mx.array([1.0]), mx.zeros((3, 2)))
