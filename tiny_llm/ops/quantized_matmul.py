"""A product with a matrix in MLX's affine format, of which each group shares a scale and a bias."""

from __future__ import annotations

import mlx.core as mx

from tiny_llm.data import QuantizedTensor


def quantized_matmul_ref(x: mx.array, weight: QuantizedTensor) -> mx.array:
    """Return ``x w^T`` where ``w = scale * q + bias`` group by group; x [T, I], w [O, I], in x's dtype.

    In float32 throughout: with bf16 activations MLX's CPU kernel sums in bf16, 4-10 % off.
    """
    y = mx.quantized_matmul(
        x.astype(mx.float32),
        weight.packed,
        weight.scales.astype(mx.float32),
        weight.biases.astype(mx.float32),
        transpose=True,
        group_size=weight.group_size,
        bits=weight.bits,
    )
    return y.astype(x.dtype)


def quantized_matmul(x: mx.array, weight: QuantizedTensor) -> mx.array:
    """Map x [T, I] by a quantized matrix [O, I] to [T, O]; see ``quantized_matmul_ref``."""
    columns = weight.packed.shape[-1] * 32 // weight.bits
    if columns != x.shape[-1]:
        raise ValueError(f"[quantized_matmul] expected x of {columns} columns, got {x.shape}")
    return quantized_matmul_ref(x, weight)
