"""How a matrix in MLX's affine format lies on disk, and how a float one becomes one.

Owns the shapes and names of the three arrays (``x.weight``, ``x.scales``, ``x.biases``) and the
choice of format for a matrix. Refuses to know files.
Format: ``w[i, j] = scales[i, j // group] * q[i, j] + biases[i, j // group]``, with q packed
from the low bits up in uint32 words (mlx.core.quantize).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from tiny_llm.config import QUANTIZED_GROUPS, Quantization
from tiny_llm.data import Matrix, QuantizedTensor

ROUTERS = (".mlp.gate.weight", ".mlp.shared_expert_gate.weight")
"""Ends of names of small matrices that choose and weigh experts: loading does not round them, nor what they
meet; those that are stored rounded become float32.
"""


def part_names(name: str) -> tuple[str, str, str]:
    """Return the names of packed values, scales and biases for ``x.weight``."""
    module = name.removesuffix(".weight")
    return name, f"{module}.scales", f"{module}.biases"


def is_explicit(name: str, quantization: Quantization | None) -> bool:
    """Return whether ``quantization`` speaks of this matrix in particular."""
    return quantization is not None and name.removesuffix(".weight") in quantization.overrides


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
