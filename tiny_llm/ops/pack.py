"""A matrix or a stack of them into the layout of the kernels in use. Owns what becomes what; no files."""

from __future__ import annotations

import mlx.core as mx

from tiny_llm.data import Matrix, QuantizedTensor
from tiny_llm.ops.backend import active, cpu


def pack(weight: Matrix, *, exact: bool, float32: bool = False) -> Matrix:
    """Return ``weight`` as the backend in use wants it, made now: its source is needed no more.

    ``cpu`` packs matrices and widens vectors to float32; ``ref`` takes all as it is. Without
    ``exact`` a quantized matrix meets activations of 8 bits, which is faster and a little off, and without
    ``float32`` too one of bfloat16 meets activations of that where the processor is fast with it.
    """
    if active() != "cpu":
        return weight
    if isinstance(weight, QuantizedTensor):
        parts = (weight.packed, weight.scales, weight.biases)
        return cpu.pack_quantized(*parts, weight.group_size, weight.bits, exact)
    if not isinstance(weight, mx.array):
        return weight
    if weight.ndim > 1:
        return cpu.pack_dense(weight, exact or float32)
    wide = weight.astype(mx.float32)
    mx.eval(wide)
    return wide
