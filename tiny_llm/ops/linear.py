"""Linear maps by matrices that are dense, quantized, or packed for the CPU kernels. Chapter 1.4.

Letters: ``T`` tokens, ``I`` inputs, ``O`` outputs, ``F`` the width of a gated pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import mlx.core as mx

from tiny_llm.data import Matrix, QuantizedTensor
from tiny_llm.metrics import fallbacks
from tiny_llm.ops.backend import active, cpu, on_mlx
from tiny_llm.ops.quantized_matmul import quantized_matmul
from tiny_llm.ops.quantized_matmul_metal import gated_product, products, quantized_of
from tiny_llm.ops.swiglu import swiglu

if TYPE_CHECKING:
    from tiny_llm._cpu import Matrix as PackedMatrix


def linear_ref(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return ``x weight^T + bias``; x [T, I], weight [O, I] as checkpoints store it, bias [O].

    The product is rounded to x's dtype before the bias is added.
    """
    y = mx.matmul(x, weight.T)
    return y if bias is None else y + bias


def linear(x: mx.array, weight: Matrix, bias: mx.array | None = None) -> mx.array:
    """Map x [T, I], or [T, H, D] with H * D = I, to [T, O]; see ``linear_ref`` and ``quantized_matmul``."""
    if not isinstance(weight, (mx.array, QuantizedTensor)):
        return cpu.linear(x, [weight], [bias])[0]
    x = x if x.ndim == 2 else x.reshape(x.shape[0], -1)
    if active() == "cpu":  # its kernels read packed matrices only
        fallbacks().add("linear")
    if isinstance(weight, QuantizedTensor):
        return quantized_matmul(x, weight, bias)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"[linear] expected a weight [O, {x.shape[-1]}] for x {x.shape}, got {weight.shape}")
    if bias is not None and on_mlx():  # added before the sum is rounded to x's dtype
        return mx.addmm(bias, x, weight.T)
    return linear_ref(x, weight, bias)


def linears(
    x: mx.array, weights: Sequence[Matrix], biases: Sequence[mx.array | None], head_dim: int = 0
) -> list[mx.array]:
    """Return ``linear(x, weight, bias)`` for each weight; the kernels make them in one pass over x [T, I].

    Each is [T, O], or with a ``head_dim`` its heads, [T, O / head_dim, head_dim]; MLX's own operations leave
    that shape to whoever takes them.
    """
    if _packed(weights):
        return cpu.linear(x, list(weights), list(biases), head_dim)
    if len(weights) == 3 and (quantized := quantized_of(x, weights, biases)):
        return products(x, quantized, biases)
    outputs = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    if not head_dim or on_mlx():
        return outputs
    return [output.reshape(output.shape[0], -1, head_dim) for output in outputs]


def gated(
    x: mx.array, gate: Matrix, up: Matrix, gate_bias: mx.array | None, up_bias: mx.array | None
) -> mx.array:
    """Return ``swiglu(linear(x, gate), linear(x, up))`` [T, F]; x [T, I], gate and up [F, I]."""
    pair = (gate, up)
    if _packed(pair):
        return cpu.gated(x, pair[0], pair[1], gate_bias, up_bias)
    quantized = quantized_of(x, pair, (gate_bias, up_bias))
    if quantized and quantized[0].packed.shape == quantized[1].packed.shape:
        return gated_product(x, quantized, (gate_bias, up_bias))
    return swiglu(linear(x, gate, gate_bias), linear(x, up, up_bias))


def _packed(weights: Sequence[Matrix]) -> TypeGuard[Sequence[PackedMatrix]]:
    """Whether the kernels can map by all of them at once: they are packed, in groups of one size."""
    group_sizes: set[int] = set()
    for weight in weights:
        if isinstance(weight, (mx.array, QuantizedTensor)):
            return False
        group_sizes.add(weight.group_size)
    # x is quantized once for all of them, in groups of the matrices' size.
    return len(group_sizes) == 1


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
