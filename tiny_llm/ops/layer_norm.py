"""Layer norm (Ba et al. 2016), which GPT-2 has. In MLX's operations on every backend: no kernel of ours."""

from __future__ import annotations

import mlx.core as mx

from tiny_llm.metrics import fallbacks
from tiny_llm.ops.backend import active, on_mlx


def layer_norm_ref(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Return ``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last axis, made in float32.

    x [..., E], weight and bias [E]; the result has x's dtype.
    """
    wide = x.astype(mx.float32)
    centred = wide - mx.mean(wide, axis=-1, keepdims=True)
    variance = mx.mean(centred * centred, axis=-1, keepdims=True)
    return (centred * mx.rsqrt(variance + eps) * weight + bias).astype(x.dtype)


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Normalise the last axis of x [..., E], scale by weight [E] and add bias [E]; see ``layer_norm_ref``."""
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"[layer_norm] expected weight and bias {x.shape[-1:]} for x {x.shape}, "
            f"got {weight.shape} and {bias.shape}"
        )
    if on_mlx() and x.size:
        return mx.fast.layer_norm(x, weight, bias, eps)
    if active() == "cpu":
        fallbacks().add("layer_norm")
    return layer_norm_ref(x, weight, bias, eps)
