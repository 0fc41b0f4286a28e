"""The units between an MLP's two halves: SwiGLU (Shazeer 2020, "GLU Variants"; chapter 1.4), and GELU."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import mlx.core as mx

from tiny_llm.ops.backend import cpu, on_cpu, on_mlx
from tiny_llm.ops.metal import kernel, on_metal

_TWICE = 2 * math.sqrt(2 / math.pi)


def swiglu_ref(gate: mx.array, up: mx.array) -> mx.array:
    """Return ``silu(gate) * up`` elementwise, where ``silu(x) = x / (1 + exp(-x))``; all three [..., F].

    silu is made in float32, and rounded to the gate's dtype before it is multiplied, as transformers does it.
    """
    wide = gate.astype(mx.float32)
    silu = wide / (1 + mx.exp(-wide))
    return silu.astype(gate.dtype) * up


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Gate ``up`` by silu of ``gate``, both [..., F]; see ``swiglu_ref``."""
    if gate.shape != up.shape:
        raise ValueError(f"[swiglu] expected gate and up of one shape, got {gate.shape} and {up.shape}")
    if on_cpu("swiglu", gate, up):
        return cpu.swiglu(gate, up)
    if on_metal("swiglu", gate, up):
        return _metal(gate, up)
    return swiglu_mlx(gate, up) if on_mlx() else swiglu_ref(gate, up)


def swiglu_mlx(gate: mx.array, up: mx.array) -> mx.array:
    """In one kernel, which MLX makes of ``swiglu_ref``; on a CPU it would call a C++ compiler for that."""
    return fused()(gate, up) if mx.default_device().type == mx.gpu else swiglu_ref(gate, up)


@cache
def fused() -> Callable[[mx.array, mx.array], mx.array]:
    """``swiglu_ref``, compiled for all shapes."""
    return mx.compile(swiglu_ref, shapeless=True)


def _metal(gate: mx.array, up: mx.array) -> mx.array:
    """A thread an element."""
    if not gate.size:
        return gate
    return kernel("swiglu")(
        inputs=[gate, up],
        template=[("T", gate.dtype)],
        grid=(gate.size, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[gate.shape],
        output_dtypes=[gate.dtype],
    )[0]


def gelu(x: mx.array) -> mx.array:
    """Return ``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x ** 3)))`` elementwise, made in float32
    (Hendrycks & Gimpel 2016), by tanh, as GPT-2 and Gemma have it.

    ``(1 + tanh(u)) / 2`` is ``sigmoid(2 u)``; and ``x sigmoid(2 u)`` is ``silu(2 u) * (x / 2 u)``, where x
    falls out of the quotient.
    """
    wide = x.astype(mx.float32)
    bent = _TWICE * (1 + 0.044715 * (wide * wide))  # 2 u / x
    if on_cpu("gelu", x):
        return cpu.swiglu(wide * bent, 1 / bent)
    return (wide * mx.sigmoid(wide * bent)).astype(x.dtype)
