"""GGUF's blocks against the gguf package's own dequantization: equal float32 weights, but for Q6_K."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm.data import QuantizedTensor
from tiny_llm.ops.backend import use, works
from tiny_llm.ops.embedding import embedding
from tiny_llm.ops.linear import pack
from tiny_llm.weights.gguf.blocks import BITS, GROUP, unpack

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

HALVES = {
    "Q4_0": (0,),
    "Q5_0": (0,),
    "Q8_0": (0,),
    "Q6_K": (208,),
}  # where a block's float16 lie; else 0 and 2
EXACT = sorted(BITS.keys() - {"Q6_K"})


def blocks(kind: str, rows: int = 9, columns: int = 768, seed: int = 0) -> np.ndarray:
    """Random bytes, but scales as weights have them: of both signs, some 0, some too small to be normal."""
    draw = np.random.default_rng(seed)
    values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = draw.integers(0, 256, (rows * columns // values, nbytes), dtype=np.uint8)
    for at in HALVES.get(kind, (0, 2)):
        scales = draw.standard_normal(len(raw)) * draw.choice([0, 1e-7, 1e-3, 0.1, 8], len(raw))
        raw[:, at : at + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, -1)


def theirs(kind: str, raw: np.ndarray) -> mx.array:
    return mx.array(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))


def wide(matrix: QuantizedTensor) -> mx.array:
    scales, biases = matrix.scales.astype(mx.float32), matrix.biases.astype(mx.float32)
    return mx.dequantize(matrix.packed, scales, biases, group_size=matrix.group_size, bits=matrix.bits)


def test_each_type_is_tried() -> None:
    assert set(EXACT) == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K"}


@pytest.mark.parametrize("kind", EXACT)
def test_equal_float32_weights(kind: str) -> None:
    raw = blocks(kind)
    matrix, expected = unpack(kind, mx.array(raw)), theirs(kind, raw)
    assert matrix.group_size == GROUP and matrix.bits == BITS[kind]
    assert matrix.packed.shape == (9, 768 * BITS[kind] // 32)
    wrong = int(mx.sum(wide(matrix) != expected).item())
    assert wrong == 0, f"{wrong} of {expected.size} weights differ"


@pytest.mark.skipif(not works(), reason="the CPU kernels were not built: no C++ compiler")
@pytest.mark.parametrize("kind", EXACT)
def test_the_kernels_have_the_same_float32_weights(kind: str) -> None:
    """Rows that the embedding's kernel widens are the packed matrix's own."""
    raw = blocks(kind)
    with use("cpu"):
        rows = embedding(mx.arange(9), pack(unpack(kind, mx.array(raw)), exact=True))
    assert rows.dtype == mx.float32
    assert mx.array_equal(rows, theirs(kind, raw))


def test_q6_k_is_off_by_a_step_of_8_bits_at_most() -> None:
    """A group of 32 has its range in 255 steps; MLX moves its ends so that 0 is a step."""
    raw = blocks("Q6_K")
    matrix, expected = unpack("Q6_K", mx.array(raw)), theirs("Q6_K", raw)
    assert matrix.bits == 8 and matrix.scales.dtype == mx.float32
    groups = expected.reshape(-1, GROUP)
    step = (groups.max(axis=1) - groups.min(axis=1)) / 255
    off = mx.abs(wide(matrix) - expected).reshape(-1, GROUP).max(axis=1)
    assert mx.all(off <= 1.01 * step + 1e-7).item(), float(mx.max(off / (step + 1e-30)).item())


def test_a_stack_of_matrices_is_matrix_by_matrix() -> None:
    raw = blocks("Q4_K", rows=6)
    stack, flat = unpack("Q4_K", mx.array(raw.reshape(2, 3, -1))), unpack("Q4_K", mx.array(raw))
    assert stack.packed.shape == (2, 3, 96) and stack.scales.shape == (2, 3, 24)
    assert mx.array_equal(stack.packed.reshape(6, -1), flat.packed)
    assert mx.array_equal(stack.biases.reshape(6, -1), flat.biases)
