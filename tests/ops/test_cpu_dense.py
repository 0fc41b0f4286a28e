"""Dense matrices packed for the CPU kernels: products and rows as those of the plain arrays."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm.data import QuantizedTensor
from tiny_llm.ops import backend
from tiny_llm.ops.backend import cpu
from tiny_llm.ops.embedding import embedding, embedding_ref
from tiny_llm.ops.linear import gated, linears, pack
from tiny_llm.ops.swiglu import swiglu_ref

pytestmark = pytest.mark.skipif(not backend.works(), reason="the CPU kernels are not built")

DTYPES = [mx.float32, mx.bfloat16, mx.float16]


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def product(x: mx.array, weight: mx.array) -> mx.array:
    return x @ weight.astype(mx.float32).T


@pytest.mark.parametrize("rows", [0, 1, 2, 13, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_maps_of_one_x(rows: int, dtype: mx.Dtype, off) -> None:
    x, bias = normal(rows, 77), normal(33, seed=3)
    weights = [normal(100, 77, seed=1).astype(dtype), normal(33, 77, seed=2).astype(dtype), normal(1, 77)]
    got = linears(x, [cpu.pack_dense(weight) for weight in weights], [None, bias, None])
    for y, weight, added in zip(got, weights, (0, bias, 0), strict=True):
        assert y.shape == (rows, weight.shape[0])
        assert not rows or off(y, product(x, weight) + added) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gated_pair(dtype: mx.Dtype, off) -> None:
    x, bias = normal(5, 64), normal(40, seed=3)
    gate, up = (normal(40, 64, seed=seed).astype(dtype) for seed in (1, 2))
    got = gated(x, cpu.pack_dense(gate), cpu.pack_dense(up), None, bias)
    assert off(got, swiglu_ref(product(x, gate), product(x, up) + bias)) < 2e-6


def test_dense_and_quantized_maps_of_one_x(off) -> None:
    """A checkpoint may quantize some of its matrices only."""
    x, dense, plain = normal(3, 64), normal(20, 64, seed=1), normal(48, 64, seed=2)
    packed = QuantizedTensor(*mx.quantize(plain, group_size=32, bits=8), 32, 8)
    with backend.use("cpu"):
        weights = [pack(m, exact=True) for m in (dense, packed, dense)]
    got = linears(x, weights, [None] * 3)
    unpacked = mx.dequantize(packed.packed, packed.scales, packed.biases, group_size=32, bits=8)
    for y, weight in zip(got, (dense, unpacked, dense), strict=True):
        assert off(y, product(x, weight)) < 2e-6


def test_views_are_packed_and_multiplied_by_their_values(off) -> None:
    weight, x = normal(64, 48), normal(10, 96, seed=1)
    (y,) = linears(x[:, ::2], [cpu.pack_dense(weight[::2])], [None])
    assert off(y, x[:, ::2] @ weight[::2].T) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype: mx.Dtype) -> None:
    """Not on their number, and not on the threads."""
    weight, x, threads = (
        cpu.pack_dense(normal(50, 300).astype(dtype)),
        normal(270, 300, seed=1),
        cpu.num_threads(),
    )
    alone = mx.concatenate([linears(row[None], [weight], [None])[0] for row in x])
    mx.eval(alone)
    for rows, used in ((2, 1), (13, 2), (270, 3), (270, 1)):
        cpu.set_num_threads(used)
        assert mx.array_equal(linears(x[:rows], [weight], [None])[0], alone[:rows])
    cpu.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens", [mx.array([20, 0, 20, 7]), mx.array([3], dtype=mx.uint32), mx.zeros(0, mx.int32)]
)
def test_rows_of_a_dense_table(dtype: mx.Dtype, tokens: mx.array) -> None:
    table = normal(21, 33).astype(dtype)
    got = embedding(tokens, cpu.pack_dense(table))
    assert got.dtype == mx.float32
    assert mx.array_equal(got, embedding_ref(tokens, table)), "a stored number is a float32"


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_rows_of_a_quantized_table(bits: int, group: int, off) -> None:
    table = QuantizedTensor(*mx.quantize(normal(21, 256), group_size=group, bits=bits), group, bits)
    with backend.use("cpu"):
        packed = pack(table, exact=False)
    tokens = mx.array([20, 0, 5, 5])
    assert off(embedding(tokens, packed), embedding_ref(tokens, table)) < 1e-6


def test_ids_outside_of_a_table_read_nothing_outside_of_it() -> None:
    table = normal(21, 33)
    got = embedding(mx.array([-1, 21, 2**31 - 1, -(2**31)]), cpu.pack_dense(table))
    assert mx.array_equal(got, table[mx.array([0, 20, 20, 0])])


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (mx.zeros(4), r"\[pack_dense\] expected a weight \[O, I\] or \[N, O, I\], got float32 \[4\]"),
        (mx.zeros((0, 4)), r"\[pack_dense\] expected a weight .*, got float32 \[0, 4\]"),
        (mx.zeros((4, 4), mx.int32), "expected float32, bfloat16 or float16, got int32"),
    ],
)
def test_what_is_no_dense_matrix_is_refused(weight: mx.array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.pack_dense(weight)


def test_what_does_not_fit_a_packed_matrix_is_refused() -> None:
    weight = cpu.pack_dense(mx.zeros((4, 8)))
    with pytest.raises(ValueError, match=r"\[linear\] expected x of 8 columns, got float32 \[1, 9\]"):
        cpu.linear(mx.zeros((1, 9)), [weight], [None])
    with pytest.raises(
        ValueError, match=r"\[linear\] expected x float32 \[T, I\] or \[T, H, D\], got float16 \[1, 8\]"
    ):
        cpu.linear(mx.zeros((1, 8), mx.float16), [weight], [None])
    with pytest.raises(ValueError, match=r"\[gated\] expected gate and up of one shape, got"):
        cpu.gated(mx.zeros((1, 8)), weight, cpu.pack_dense(mx.zeros((5, 8))), None, None)
    with pytest.raises(ValueError, match=r"\[embedding\] expected integer tokens \[T\], got float32 \[1\]"):
        cpu.embedding(mx.zeros(1), weight)
