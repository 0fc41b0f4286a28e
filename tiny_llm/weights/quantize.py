"""How a quantized matrix lies on disk in each format that checkpoints come in, and how one becomes ours.

Owns MLX's affine format (``x.weight``, ``x.scales``, ``x.biases``), and which of it a matrix gets; and the
formats that become it: MLX's floats of 4 and 8 bits, AWQ's and GPTQ's 4 bits, each as an affine matrix of the
very same numbers, or floats where its groups are too small for that. Refuses to know files.
Affine: ``w[i, j] = scales[i, j // group] * q[i, j] + biases[i, j // group]``, with q packed from the low bits
up in uint32 words (mlx.core.quantize). Other sources: AutoAWQ's gemm layout; AutoGPTQ's layout, version 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from tiny_llm.config import QUANTIZED_GROUPS, Quantization
from tiny_llm.data import Matrix, QuantizedTensor
from tiny_llm.errors import WeightError

ROUTERS = (".mlp.gate.weight", ".mlp.shared_expert_gate.weight")
"""Ends of names of small matrices that choose and weigh experts: loading does not round them, nor what they
meet; those that are stored rounded become float32.
"""


def part_names(name: str) -> tuple[str, str, str]:
    """Return the names of packed values, scales and biases for ``x.weight``."""
    module = name.removesuffix(".weight")
    return name, f"{module}.scales", f"{module}.biases"


def format_of(name: str, quantization: Quantization | None) -> Quantization | None:
    """Return what ``quantization`` says of one matrix: its module's override, or the default."""
    if quantization is None:
        return None
    return quantization.overrides.get(name.removesuffix(".weight"), quantization)


def fit_group(name: str, columns: int, quantization: Quantization | None) -> Quantization | None:
    """Return ``quantization`` with the largest group that divides ``columns``, at most the one wanted.

    None if none does: such a matrix stays as it is, and so does one of ROUTERS.
    """
    if quantization is None or name.endswith(ROUTERS):
        return None
    for group_size in sorted(QUANTIZED_GROUPS, reverse=True):
        if group_size <= quantization.group_size and columns % group_size == 0:
            return Quantization(quantization.bits, group_size)
    return None


def quantize_matrix(matrix: mx.array, quantization: Quantization) -> QuantizedTensor:
    """Quantize [out, in] by groups along ``in``, which they must divide; at once, so that floats can go."""
    group_size, bits = quantization.group_size, quantization.bits
    parts = mx.quantize(matrix, group_size=group_size, bits=bits)
    mx.eval(*parts)
    return QuantizedTensor(*parts, group_size, bits)


def dequantized(matrix: QuantizedTensor) -> mx.array:
    """The same weights as float32 [out, in]."""
    scales, biases = (part.astype(mx.float32) for part in (matrix.scales, matrix.biases))
    whole = mx.dequantize(matrix.packed, scales, biases, matrix.group_size, matrix.bits)
    mx.eval(whole)
    return whole


def combined(parts: Sequence[Matrix], how: Callable[[list[mx.array]], mx.array]) -> Matrix:
    """Return the matrix each of whose arrays ``how`` makes of theirs, evaluated, so that they can go."""
    first = parts[0]
    if not isinstance(first, QuantizedTensor):
        whole = how([part for part in parts if isinstance(part, mx.array)])
        mx.eval(whole)
        return whole
    packed, scales, biases = (
        how([getattr(part, x) for part in parts]) for x in ("packed", "scales", "biases")
    )
    mx.eval(packed, scales, biases)
    return QuantizedTensor(packed, scales, biases, first.group_size, first.bits)


def joined(parts: Sequence[Matrix]) -> Matrix:
    """Put blocks of rows of one matrix under each other again."""
    return parts[0] if len(parts) == 1 else combined(parts, mx.concatenate)


def stacked(parts: Sequence[Matrix]) -> Matrix:
    """Put matrices behind each other, along a new first axis; one stays as it is."""
    return parts[0] if len(parts) == 1 else combined(parts, mx.stack)


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
