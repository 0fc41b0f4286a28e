"""A linear map by a dense or a quantized matrix. Chapter 1.4."""

from __future__ import annotations

import mlx.core as mx

from tiny_llm.data import QuantizedTensor
from tiny_llm.ops.quantized_matmul import quantized_matmul


def linear_ref(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return ``x weight^T + bias``; x [T, I], weight [O, I] as checkpoints store it, bias [O]."""
    y = mx.matmul(x, weight.T)
    return y if bias is None else y + bias


def linear(x: mx.array, weight: mx.array | QuantizedTensor, bias: mx.array | None = None) -> mx.array:
    """Map x [T, I] to [T, O]; a quantized weight goes through ``quantized_matmul``. See ``linear_ref``."""
    if isinstance(weight, QuantizedTensor):
        y = quantized_matmul(x, weight)
        return y if bias is None else y + bias
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"[linear] expected a weight [O, {x.shape[-1]}] for x {x.shape}, got {weight.shape}")
    return linear_ref(x, weight, bias)
