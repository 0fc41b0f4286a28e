"""GELU (Hendrycks & Gimpel 2016) by tanh, as GPT-2 and Gemma have it. In MLX's operations everywhere."""

from __future__ import annotations

import math

import mlx.core as mx

from tiny_llm.metrics import fallbacks
from tiny_llm.ops.backend import active


def gelu(x: mx.array) -> mx.array:
    """Return ``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x ** 3)))`` elementwise, made in float32."""
    if active() == "cpu":
        fallbacks().add("gelu")
    wide = x.astype(mx.float32)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * (wide * wide * wide))
    return (0.5 * wide * (1 + mx.tanh(inner))).astype(x.dtype)
