"""GELU (Hendrycks & Gimpel 2016) by tanh, as GPT-2 and Gemma have it; on "cpu" by the kernel of SwiGLU."""

from __future__ import annotations

import math

import mlx.core as mx

from tiny_llm.ops.backend import cpu, on_cpu

_TWICE = 2 * math.sqrt(2 / math.pi)


def gelu(x: mx.array) -> mx.array:
    """Return ``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x ** 3)))`` elementwise, made in float32.

    ``(1 + tanh(u)) / 2`` is ``sigmoid(2 u)``; and ``x sigmoid(2 u)`` is ``silu(2 u) * (x / 2 u)``, where x
    falls out of the quotient.
    """
    wide = x.astype(mx.float32)
    bent = _TWICE * (1 + 0.044715 * (wide * wide))  # 2 u / x
    if on_cpu("gelu", x):
        return cpu.swiglu(wide * bent, 1 / bent)
    return (wide * mx.sigmoid(wide * bent)).astype(x.dtype)
