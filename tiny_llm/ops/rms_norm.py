"""Root mean square norm (Zhang & Sennrich 2019). Chapter 1.4."""

from __future__ import annotations

import mlx.core as mx

from tiny_llm.ops.backend import cpu, on_cpu, on_mlx
from tiny_llm.ops.metal import kernel, on_metal, scalar


def rms_norm_ref(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return ``x / sqrt(mean(x ** 2) + eps) * weight`` over the last axis; x [..., E], weight [E].

    The mean is made in float32; the quotient is rounded to x's dtype, which the weight has too, and then
    multiplied, as transformers does it.
    """
    wide = x.astype(mx.float32)
    mean_square = mx.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * mx.rsqrt(mean_square + eps)).astype(x.dtype) * weight


def add_rms_norm_ref(
    x: mx.array, residual: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """Return ``x + residual`` and its norm: what stands between two halves of a decoder layer."""
    total = x + residual
    return total, rms_norm_ref(total, weight, eps)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Normalise the last axis of x [..., E] and scale by weight [E]; see ``rms_norm_ref``."""
    if on_cpu("rms_norm", x, weight):
        return cpu.rms_norm(x, weight, eps)
    _check(x, weight)
    if on_metal("rms_norm", x, weight):
        return _metal("rms_norm", [x, weight, scalar(eps)], x, outputs=1)[0]
    return rms_norm_mlx(x, weight, eps) if on_mlx() else rms_norm_ref(x, weight, eps)


def rms_norm_mlx(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """MLX's kernel, which rounds where ``rms_norm_ref`` does."""
    return mx.fast.rms_norm(x, weight, eps) if x.size else rms_norm_ref(x, weight, eps)


def add_rms_norm(x: mx.array, residual: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """Add residual to x, both [..., E], and normalise; return both, see ``add_rms_norm_ref``."""
    if on_cpu("rms_norm", x, residual, weight):
        return cpu.add_rms_norm(x, residual, weight, eps)
    _check(x, weight)
    if residual.shape != x.shape:
        raise ValueError(f"[add_rms_norm] expected a residual {x.shape} like x, got {residual.shape}")
    if on_metal("rms_norm", x, residual, weight):
        total, out = _metal("add_rms_norm", [x, residual, weight, scalar(eps)], x, outputs=2)
        return total, out
    if on_mlx():
        total = x + residual
        return total, rms_norm_mlx(total, weight, eps)
    return add_rms_norm_ref(x, residual, weight, eps)


def _metal(name: str, inputs: list[mx.array], x: mx.array, *, outputs: int) -> list[mx.array]:
    """A threadgroup for up to 8 rows, of a size that depends on a row's width alone."""
    if not x.size:
        return [mx.zeros_like(x)] * outputs
    width = x.shape[-1]
    rows = x.size // width
    simdgroups = -(-width // 128)  # a lane holds 4 numbers of a row, or more where a threadgroup is full
    threads = min(1024, 32 * simdgroups)
    # Rows that share what is read of the weight: a power of two, as each number of them is a kernel of its
    # own, and so few that 8 threadgroups have work.
    together = min(8, 1 << (-(-rows // 8) - 1).bit_length())
    threadgroups = -(-rows // together)
    return kernel(name, "rms_norm")(
        inputs=[*inputs, scalar(rows)],
        template=[("T", x.dtype), ("E", width), ("TG", threads), ("R", together)],
        grid=(threadgroups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape] * outputs,
        output_dtypes=[x.dtype] * outputs,
    )


def _check(x: mx.array, weight: mx.array) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"[rms_norm] expected weight {x.shape[-1:]} for x {x.shape}, got {weight.shape}")
