"""Softmax over the last axis. Chapter 1.1 stands on it."""

from __future__ import annotations

import mlx.core as mx

from tiny_llm.ops.backend import cpu, on_cpu


def softmax_ref(x: mx.array) -> mx.array:
    """Return ``exp(x) / sum(exp(x))`` over the last axis, in x's shape and dtype.

    The row's largest value is subtracted first: the quotient stays the same and no
    exponential overflows. -inf becomes 0. All is made in float32, and rounded to x's dtype at the end.
    """
    wide = x.astype(mx.float32)
    exponentials = mx.exp(wide - mx.max(wide, axis=-1, keepdims=True))
    return (exponentials / mx.sum(exponentials, axis=-1, keepdims=True)).astype(x.dtype)


def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis of x [..., N]; see ``softmax_ref``."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"[softmax] expected at least one value a row, got shape {x.shape}")
    return cpu.softmax(x) if on_cpu("softmax", x) else softmax_ref(x)
