"""A product with a matrix in MLX's affine format, of which each group shares a scale and a bias."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from tiny_llm.data import QuantizedTensor
from tiny_llm.metrics import fallbacks
from tiny_llm.ops.backend import active, cpu, on_mlx, runs_ours
from tiny_llm.ops.quantized_matmul_metal import products, quantized_of


def quantized_matmul_ref(x: mx.array, weight: QuantizedTensor) -> mx.array:
    """Return ``x w^T`` where ``w = scale * q + bias`` group by group; x [T, I], w [O, I], in x's dtype.

    In float32 throughout: with bf16 activations MLX's CPU kernel sums in bf16, 4-10 % off.
    """
    return quantized_matmul_mlx(x.astype(mx.float32), in_float32(weight)).astype(x.dtype)


def in_float32(weight: QuantizedTensor) -> QuantizedTensor:
    """The same matrix, its scales and biases wide."""
    scales, biases = (a.astype(mx.float32) for a in (weight.scales, weight.biases))
    return replace(weight, scales=scales, biases=biases)


def quantized_matmul(x: mx.array, weight: QuantizedTensor, bias: mx.array | None = None) -> mx.array:
    """Map x [T, I] by a quantized matrix [O, I] to [T, O], plus a bias [O]; see ``quantized_matmul_ref``."""
    columns = weight.packed.shape[-1] * 32 // weight.bits
    if columns != x.shape[-1]:
        raise ValueError(f"[quantized_matmul] expected x of {columns} columns, got {x.shape}")
    if not x.size:  # MLX 0.32.4 divides by the number of rows, and ends the process
        return mx.zeros((*x.shape[:-1], weight.packed.shape[0]), x.dtype)
    if weights := quantized_of(x, [weight], [bias]):
        return products(x, weights, [bias])[0]
    y = _product(x, weight)
    return y if bias is None else y + bias


def _product(x: mx.array, weight: QuantizedTensor) -> mx.array:
    if x.ndim == 2 and weight.bits in (2, 4, 8) and active() == "cpu":
        return _cpu(x, weight)
    if runs_ours("quantized_matmul"):
        fallbacks().add("quantized_matmul")
    return quantized_matmul_mlx(x, weight) if on_mlx() else quantized_matmul_ref(x, weight)


def quantized_matmul_mlx(x: mx.array, weight: QuantizedTensor) -> mx.array:
    """In x's dtype; MLX's kernels for GPUs sum in float32 all the same."""
    parts = weight.packed, weight.scales, weight.biases
    y = mx.quantized_matmul(x, *parts, transpose=True, group_size=weight.group_size, bits=weight.bits)
    return y.astype(x.dtype)


def _cpu(x: mx.array, weight: QuantizedTensor) -> mx.array:
    """By the kernel that reads a matrix as it lies; what models keep is packed, and goes to ``linear``'s."""
    wide, numbers = in_float32(weight), (weight.group_size, weight.bits)
    y = cpu.quantized_rows(x.astype(mx.float32), wide.packed, wide.scales, wide.biases, *numbers)
    return y.astype(x.dtype)
