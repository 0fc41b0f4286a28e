"""What ``ops/swiglu.py`` becomes where a learner has a kernels/cpu/swiglu.cpp of their own.

The overlay puts these definitions in the place of the reference's, and of those in a learner's Python file.
"""

from __future__ import annotations

import ctypes

import mlx.core as mx

from book.course.native import learners, pointers


def swiglu_ref(gate: mx.array, up: mx.array) -> mx.array:
    """Return ``silu(gate) * up`` by the learner's kernel, at once, in gate's dtype; both [..., F]."""
    wide = [mx.contiguous(a.astype(mx.float32)) for a in (gate, up)]
    out = mx.zeros(gate.shape)
    mx.eval(wide, out)
    learners("swiglu").swiglu(*pointers([*wide, out]), ctypes.c_int64(out.size))
    return out.astype(gate.dtype)
