"""The gated unit between an MLP's two halves (Shazeer 2020, "GLU Variants"). Chapter 1.4."""

from __future__ import annotations

import mlx.core as mx

from tiny_llm.ops.backend import cpu, on_cpu


def swiglu_ref(gate: mx.array, up: mx.array) -> mx.array:
    """Return ``silu(gate) * up`` elementwise, where ``silu(x) = x / (1 + exp(-x))``; all three [..., F]."""
    wide = gate.astype(mx.float32)
    silu = wide / (1 + mx.exp(-wide))
    return silu.astype(gate.dtype) * up


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Gate ``up`` by silu of ``gate``, both [..., F]; see ``swiglu_ref``."""
    if gate.shape != up.shape:
        raise ValueError(f"[swiglu] expected gate and up of one shape, got {gate.shape} and {up.shape}")
    return cpu.swiglu(gate, up) if on_cpu("swiglu", gate, up) else swiglu_ref(gate, up)
