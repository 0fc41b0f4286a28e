"""The gated unit between an MLP's two halves (Shazeer 2020, "GLU Variants"). Chapter 1.4."""

from __future__ import annotations

import mlx.core as mx

from tiny_llm.ops.backend import cpu, on_cpu
from tiny_llm.ops.metal import kernel, on_metal


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
    return _metal(gate, up) if on_metal("swiglu", gate, up) else swiglu_ref(gate, up)


def _metal(gate: mx.array, up: mx.array) -> mx.array:
    """A thread an element."""
    if not gate.size:
        return gate
    (out,) = kernel("swiglu")(
        inputs=[gate, up],
        template=[("T", gate.dtype)],
        grid=(gate.size, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[gate.shape],
        output_dtypes=[gate.dtype],
    )
    return out
