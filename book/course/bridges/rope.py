"""What ``ops/rope.py`` becomes where a learner has a kernels/cpu/rope.cpp of their own.

The overlay puts these definitions in the place of the reference's, and of those in a learner's Python file.
"""

from __future__ import annotations

import ctypes

import mlx.core as mx

from book.course.native import learners, pointers


def rope_qk_ref(
    q: mx.array,
    k: mx.array,
    positions: mx.array,
    inv_freq: mx.array,
    q_norm: mx.array | None,
    k_norm: mx.array | None,
    eps: float,
) -> tuple[mx.array, mx.array]:
    """Return q [T, H, D] and k [T, K, D] turned by the learner's kernel, at once."""
    D = 2 * inv_freq.size
    heads = [mx.contiguous(x.reshape(x.shape[0], -1, D).astype(mx.float32)) for x in (q, k)]
    norms = [None if norm is None else mx.contiguous(norm.astype(mx.float32)) for norm in (q_norm, k_norm)]
    outs = [mx.zeros(x.shape) for x in heads]
    angles = [mx.contiguous(positions.astype(mx.int32)), mx.contiguous(inv_freq)]
    mx.eval(heads, [norm for norm in norms if norm is not None], outs, angles)
    sizes = map(ctypes.c_int64, (q.shape[0], heads[0].shape[1], heads[1].shape[1], D))
    learners("rope").rope_qk(*pointers([*heads, *norms, *outs, *angles]), *sizes, ctypes.c_float(eps))
    return outs[0].astype(q.dtype), outs[1].astype(k.dtype)
