"""What ``ops/rms_norm.py`` becomes where a learner has a kernels/cpu/rms_norm.cpp of their own.

The overlay puts these definitions in the place of the reference's, and of those in a learner's Python file.
"""

from __future__ import annotations

import ctypes

import mlx.core as mx

from book.course.native import learners, pointers


def add_rms_norm_ref(
    x: mx.array, residual: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """Return ``x + residual`` and its norm by the learner's kernel, at once, in x's dtype; both [..., E]."""
    wide = [mx.contiguous(a.astype(mx.float32)) for a in (x, residual, weight)]
    total, out = (mx.zeros(x.shape) for _ in range(2))
    mx.eval(wide, total, out)
    sizes = (ctypes.c_int64(x.size // x.shape[-1]), ctypes.c_int64(x.shape[-1]), ctypes.c_float(eps))
    learners("rms_norm").add_rms_norm(*pointers([*wide, total, out]), *sizes)
    return total.astype(x.dtype), out.astype(x.dtype)
