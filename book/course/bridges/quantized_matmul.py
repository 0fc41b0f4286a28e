"""What ``ops/quantized_matmul.py`` becomes where a learner has a kernels/cpu/quantized_rows.cpp of their own.

The overlay puts these definitions in the place of the reference's, and of those in a learner's Python file.
"""

from __future__ import annotations

import ctypes

import mlx.core as mx

from book.course.native import learners, pointers
from tiny_llm.data import QuantizedTensor


def quantized_matmul_ref(x: mx.array, weight: QuantizedTensor) -> mx.array:
    """Return ``x w^T`` by the learner's kernel, at once and not lazily; x [T, I], w [O, I], in x's dtype."""
    if weight.bits not in (2, 4, 8):
        raise ValueError(f"[quantized_matmul] the kernel of 2.3 takes 2, 4 or 8 bits, got {weight.bits}")
    wide = [mx.contiguous(a.astype(mx.float32)) for a in (x, weight.scales, weight.biases)]
    words, out = mx.contiguous(weight.packed), mx.zeros((x.shape[0], weight.packed.shape[0]))
    mx.eval(wide, words, out)
    sizes = map(ctypes.c_int64, (x.shape[0], x.shape[1], out.shape[1]))
    numbers = (*sizes, weight.group_size, weight.bits)
    learners("quantized_rows").quantized_rows(*pointers([wide[0], words, *wide[1:], out]), *numbers)
    return out.astype(x.dtype)
