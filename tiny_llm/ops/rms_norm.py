"""Root mean square norm (Zhang & Sennrich 2019). Chapter 1.4."""

from __future__ import annotations

import mlx.core as mx


def rms_norm_ref(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return ``x / sqrt(mean(x ** 2) + eps) * weight`` over the last axis; x [..., E], weight [E].

    The mean is made in float32; the result has x's dtype.
    """
    wide = x.astype(mx.float32)
    mean_square = mx.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * mx.rsqrt(mean_square + eps)).astype(x.dtype) * weight


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Normalise the last axis of x [..., E] and scale by weight [E]; see ``rms_norm_ref``."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"[rms_norm] expected weight {x.shape[-1:]} for x {x.shape}, got {weight.shape}")
    return rms_norm_ref(x, weight, eps)
