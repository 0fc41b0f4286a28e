"""The place of the largest value of the last axis: greedy decoding's choice."""

from __future__ import annotations

import mlx.core as mx

from tiny_llm.ops.backend import cpu, on_cpu


def argmax_ref(x: mx.array) -> mx.array:
    """Return uint32 [...] for x [..., N]: the lowest place among equals; a NaN is larger than any number."""
    return mx.argmax(x, axis=-1)


def argmax(x: mx.array) -> mx.array:
    """Where the last axis of x [..., N] is largest; see ``argmax_ref``."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"[argmax] expected at least one value a row, got shape {x.shape}")
    return cpu.argmax(x) if on_cpu("argmax", x) else argmax_ref(x)
