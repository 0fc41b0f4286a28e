"""How a quantized matrix lies on disk in each format that checkpoints come in, and how it becomes ours.

Owns the formats that are not MLX's affine one: MLX's floats of 4 and 8 bits, AWQ's and GPTQ's 4 bits.
Each becomes an affine matrix of the very same numbers, or floats where its groups are too small for that.
Sources: mlx.core.quantize; AutoAWQ's gemm layout; AutoGPTQ's layout, version 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from tiny_llm.config import Quantization
from tiny_llm.data import Matrix, QuantizedTensor
from tiny_llm.errors import WeightError

FLOATS = ("F32", "BF16", "F16")
_IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the eight columns of a word lie in it
_HALVES = 12  # 2 * 6, the largest of the 4-bit floats, counted in halves


class Part(NamedTuple):
    """A tensor that must be on disk, one of those that a matrix is made of."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def parts_of(name: str, shape: tuple[int, ...], format: Quantization) -> tuple[Part, ...]:
    """What a matrix ``x.weight`` of ``shape`` [out, in] is stored as in ``format``."""
    module = name.removesuffix(".weight")
    *rows, columns = shape
    groups = columns // format.group_size
    words = columns * format.bits // 32
    if format.method in ("awq", "gptq"):
        (outputs,) = rows
        packed = (words, outputs) if format.method == "gptq" else (columns, outputs // 8)
        parts = (
            Part(f"{module}.qweight", packed, ("I32",)),
            Part(f"{module}.qzeros", (groups, outputs // 8), ("I32",)),
            Part(f"{module}.scales", (groups, outputs), FLOATS),
        )
        return (*parts, Part(f"{module}.g_idx", (columns,), ("I32",))) if format.method == "gptq" else parts
    packed_part = Part(name, (*rows, words), ("U32",))
    if format.method != "affine":
        return packed_part, Part(f"{module}.scales", (*rows, groups), ("U8",))
    return packed_part, *(Part(f"{module}.{end}", (*rows, groups), FLOATS) for end in ("scales", "biases"))


def made(parts: Sequence[mx.array], format: Quantization, name: str) -> Matrix:
    """Make ours of ``parts_of``'s tensors in another format than MLX's affine one, evaluated.

    Raises WeightError for GPTQ's act-order.
    """
    if format.method in ("mxfp8", "nvfp4"):
        floats = mx.dequantize(parts[0], parts[1], mode=format.method, dtype=mx.bfloat16)
        mx.eval(floats)
        return floats
    matrix = _of_halves(parts[0], parts[1]) if format.method == "mxfp4" else _of_columns(parts, format, name)
    mx.eval(matrix.packed, matrix.scales, matrix.biases)
    return matrix


def _of_halves(packed: mx.array, scales: mx.array) -> QuantizedTensor:
    """Floats of 4 bits in groups of 32 are whole halves from -12 to 12: affine with 5 bits, exactly."""
    ones = mx.full(scales.shape, 127, mx.uint8)  # the exponent of 1
    halves = mx.dequantize(packed, ones, mode="mxfp4", dtype=mx.float32) * 2 + _HALVES
    half = mx.power(2.0, scales.astype(mx.float32) - 128).astype(mx.bfloat16)
    return QuantizedTensor(_packed_5(halves.astype(mx.uint64)), half, half * -_HALVES, 32, 5)


def _packed_5(q: mx.array) -> mx.array:
    """Eight values of 5 bits [..., n] to five bytes, from the low bits up, in words [..., n * 5 / 32]."""
    eights = (q.reshape(*q.shape[:-1], -1, 8) << (5 * mx.arange(8, dtype=mx.uint64))).sum(axis=-1)
    some = (eights[..., None] >> (8 * mx.arange(5, dtype=mx.uint64))).astype(mx.uint8)
    return some.reshape(*q.shape[:-1], -1).view(mx.uint32)


def _of_columns(parts: Sequence[mx.array], format: Quantization, name: str) -> QuantizedTensor:
    """``(q - zero) * scale``, transposed. A word holds eight outputs in AWQ, eight inputs in GPTQ."""
    words, zeros, scales, *index = parts
    if index and not mx.array_equal(index[0], mx.arange(index[0].size) // format.group_size).item():
        raise WeightError(
            f"{name} was quantized by GPTQ with its inputs in another order (desc_act, or act-order), which "
            "is not supported. Use a checkpoint without it."
        )
    if format.method == "awq":
        q = _nibbles(words, _AWQ_ORDER).T
        packed = (q[:, ::2] | (q[:, 1::2] << 4)).view(mx.uint32)
        zero = _nibbles(zeros, _AWQ_ORDER).T
    else:
        packed = mx.contiguous(words.T).view(mx.uint32)
        zero = (_nibbles(zeros, _IN_ORDER).T + 1) & 15  # a zero is kept less one
    scale = mx.contiguous(scales.T).astype(mx.float32)  # scale * zero has more bits than half floats do
    return QuantizedTensor(packed, scale, -scale * zero, format.group_size, 4)


def _nibbles(words: mx.array, order: tuple[int, ...]) -> mx.array:
    """Words [n, m] to values [n, m * 8], the k-th of a word from place ``order[k]`` in it."""
    shifts = 4 * mx.array(order, mx.uint32)
    values = (words.view(mx.uint32)[..., None] >> shifts).astype(mx.uint8) & 15
    return values.reshape(words.shape[0], -1)
