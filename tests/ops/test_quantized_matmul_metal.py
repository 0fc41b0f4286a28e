"""The product of a few rows with a quantized matrix, as Metal: who reads what, sums what, stores what."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm.data import QuantizedTensor
from tiny_llm.metalsim.run import watch
from tiny_llm.ops.linear import gated
from tiny_llm.ops.metal import kernel
from tiny_llm.ops.quantized_matmul import quantized_matmul_ref
from tiny_llm.ops.rms_norm import rms_norm_ref
from tiny_llm.ops.rope import rope_qk, rope_ref
from tiny_llm.ops.swiglu import swiglu_ref

pytestmark = [pytest.mark.usefixtures("where"), pytest.mark.chapter("2.4")]

TOLERANCE = {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


def normal(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def quantized(
    outputs: int, inputs: int, bits: int, group: int, dtype: mx.Dtype = mx.float32, seed: int = 5
) -> QuantizedTensor:
    weight = normal(outputs, inputs, seed=seed, dtype=dtype) + 0.3
    return QuantizedTensor(*mx.quantize(weight, group_size=group, bits=bits), group, bits)


def product(
    x: mx.array, weight: QuantizedTensor, rows: int = 1, *, bias: mx.array | None = None, blocks: int = 1
) -> mx.array:
    """x w^T by the kernel, ``rows`` of x a block, and so many blocks in a threadgroup."""
    T, outputs = x.shape[0], weight.packed.shape[0]
    parts = [weight.packed, weight.scales, weight.biases, x if bias is None else bias]
    formats = [("T", x.dtype), ("S", weight.scales.dtype), ("I", x.shape[1]), ("BITS", weight.bits)]
    (out,) = kernel("quantized_matmul")(
        inputs=[x, *parts, T, outputs],
        template=[*formats, ("GROUP", weight.group_size), ("BIAS", bias is not None), ("R", rows)],
        grid=(32, -(-outputs // 8), -(-T // rows)),
        threadgroup=(32, 2, blocks),
        output_shapes=[(T, outputs)],
        output_dtypes=[x.dtype],
    )
    return out


def test_one_row_by_hand() -> None:
    """q is 0, 1 ... 15, 0, 1 ... 15; scale 2 and bias -1. x looks at two of the weights."""
    words = mx.array([[0x76543210, 0xFEDCBA98] * 2] * 8, dtype=mx.uint32)
    scale, bias = mx.full((8, 1), 2.0), mx.full((8, 1), -1.0)
    x = mx.zeros((1, 32))
    x[0, 3], x[0, 25] = 1.0, 10.0
    (got,) = product(x, QuantizedTensor(words, scale, bias, 32, 4)).tolist()
    assert got == [(2 * 3 - 1) + 10 * (2 * 9 - 1)] * 8, "q = 3 of input 3, and ten times q = 9 of input 25"


@pytest.mark.parametrize(("bits", "group", "inputs"), [(4, 64, 704), (8, 32, 352)])
def test_one_row_is_as_the_definition(assert_close, bits: int, group: int, inputs: int) -> None:
    """22 and 11 chunks: eight lanes do not get the same number of them."""
    weight, x = quantized(11, inputs, bits, group), normal(1, inputs)
    dense = mx.dequantize(weight.packed, weight.scales, weight.biases, group_size=group, bits=bits)
    biases = mx.repeat(weight.biases, group, axis=1)
    whole = inputs // 32 // 8 * 8 * 32  # inputs of rounds in which each lane has a chunk
    assert_close(
        product(x, weight),
        x @ dense.T,
        tolerance=3e-6,
        the_last_chunks_left_out=x[:, :whole] @ dense[:, :whole].T,
        no_bias=x @ (dense - biases).T,
    )


@pytest.mark.parametrize(("T", "rows"), [(2, 2), (4, 4), (6, 4)])
def test_rows_have_the_bits_that_each_has_alone(T: int, rows: int) -> None:
    weight, x = quantized(11, 352, 4, 32), normal(T, 352)
    together = product(x, weight, rows)
    for t in range(T):
        alone = product(x[t : t + 1], weight)
        assert mx.array_equal(together[t : t + 1], alone).item(), f"row {t} of {T}, {rows} at a time"


@pytest.mark.parametrize("rows", [1, 4])
def test_a_weight_s_bytes_are_read_once_for_all_rows_of_a_block(rows: int) -> None:
    weight = quantized(16, 512, 4, 64, mx.bfloat16)
    x = normal(rows, 512, dtype=mx.bfloat16)
    with watch() as seen:
        product(x, weight, rows)
    if not seen:
        pytest.skip("a GPU does not say what it reads")
    ((_, traffic),) = seen
    assert traffic.read["packed"] == weight.packed.nbytes, "each word once, whatever the number of rows"
    assert traffic.read["x"] == 8 * x.nbytes, "once for each of the 8 pairs of outputs"
    assert traffic.written["out"] == rows * 16 * 2, "each output once"


@pytest.mark.parametrize(("dtype", "rows"), [(mx.bfloat16, 4), (mx.float16, 1)])
def test_sums_are_float_and_a_bias_is_added_to_what_was_rounded(dtype: mx.Dtype, rows: int) -> None:
    weight, x = quantized(11, 352, 4, 32, dtype), normal(rows, 352, dtype=dtype)
    bias = 3 * normal(11, seed=7, dtype=dtype)
    got = product(x, weight, rows, bias=bias)
    wide = QuantizedTensor(
        weight.packed, weight.scales.astype(mx.float32), weight.biases.astype(mx.float32), 32, 4
    )
    exact = quantized_matmul_ref(x.astype(mx.float32), wide)
    differing = mx.mean(got != exact.astype(dtype) + bias).item()
    assert differing < 0.1, f"{differing:.0%} of the outputs are not the rounded sum plus the bias, rounded"


def test_blocks_share_a_threadgroup() -> None:
    """What the engine does with more rows than a block has; outputs past the end are not stored."""
    weight, x = quantized(11, 352, 4, 32), normal(6, 352)
    expected = mx.concatenate([product(x[t : t + 1], weight) for t in range(6)])
    assert mx.array_equal(product(x, weight, 2, blocks=3), expected).item()


def test_the_two_outputs_may_be_of_two_matrices(assert_close) -> None:
    """As in a gated unit: one half of the lanes' sums is the gate's."""
    gate, up = quantized(6, 96, 8, 32), quantized(6, 96, 8, 32, seed=6)
    x = normal(1, 96)
    first, second = (quantized_matmul_ref(x, weight) for weight in (gate, up))
    assert_close(
        gated(x, gate, up, None, None),
        swiglu_ref(first, second),
        both_of_the_first_matrix=swiglu_ref(first, first),
    )


def turned(
    q: mx.array, k: mx.array, weight: mx.array, eps: float = 1e-6, k_weight: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Heads normed, and turned by no angle at all."""
    none = mx.zeros(q.shape[-1] // 2)
    return rope_qk(q, k, mx.arange(q.shape[0]), none, weight, weight if k_weight is None else k_weight, eps)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("D", [64, 80])
def test_a_head_s_norm_is_rounded_and_then_multiplied(D: int, dtype: mx.Dtype) -> None:
    """80: in the second turn only 8 of the 32 lanes have a pair."""
    q, k = normal(2, 3, D, dtype=dtype), 0.01 * normal(2, 1, D, seed=1, dtype=dtype)
    weight, other = normal(D, seed=2, dtype=dtype), 96 * normal(D, seed=3, dtype=dtype)
    for eps in (1e-6, 0.5):
        for got, x, w in zip(turned(q, k, weight, eps, other), (q, k), (weight, other), strict=True):
            wide = x.astype(mx.float32)
            normed = wide * mx.rsqrt(mx.mean(wide * wide, axis=-1, keepdims=True) + eps)
            expected = normed.astype(dtype) * w
            once = (normed * w.astype(mx.float32)).astype(dtype)
            close = mx.abs(got - expected) <= 3e-6 * mx.max(mx.abs(expected))
            near = mx.mean(close if dtype == mx.float32 else got == expected).item()
            hint = " It is that of one rounding less." if mx.array_equal(got, once).item() else ""
            assert near > 0.98, f"{1 - near:.0%} of the numbers differ at eps {eps:g}.{hint}"


def test_a_normed_head_is_rounded_before_it_is_turned() -> None:
    q, k = normal(2, 3, 64, dtype=mx.bfloat16), normal(2, 1, 64, seed=1, dtype=mx.bfloat16)
    weight, positions, inv_freq = normal(64, seed=2, dtype=mx.bfloat16), mx.array([3, 7]), mx.arange(32) / 9.0
    got, _ = rope_qk(q, k, positions, inv_freq, weight, weight, 1e-6)
    expected = rope_ref(rms_norm_ref(q, weight, 1e-6), positions, inv_freq)
    differing = mx.mean(got != expected).item()
    assert differing < 0.02, f"{differing:.0%} of the numbers differ once they are turned"
