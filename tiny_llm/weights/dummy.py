"""Random weights in the shapes of a model, to measure with where there is no checkpoint.

Owns their making, which is quick: one piece of noise, again and again. Logits are finite and mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import mlx.core as mx

from tiny_llm.config import Quantization
from tiny_llm.data import Matrix, QuantizedTensor
from tiny_llm.weights.assemble import Finish
from tiny_llm.weights.foreign import parts_of
from tiny_llm.weights.quantize import fit_group

PIECE = 2**20 + 7
"""Values of noise; no row's length divides it, so that rows differ."""


def dummy_weights(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: mx.Dtype,
    quantize: Quantization | None,
    quantizable: Collection[str],
    finish: Finish = lambda weight: weight,
) -> dict[str, Matrix]:
    """Return a random tensor for each name and shape, as ``load_weights`` would return a checkpoint's.

    Matrices have a standard deviation of ``1 / sqrt(columns)``, so that a product keeps its input's
    size; vectors are ones. Floats are of ``dtype``.
    """
    noise = mx.random.normal((PIECE,), key=mx.random.key(0)).astype(dtype)
    halves = mx.random.randint(0, 2**16, (2, PIECE), mx.uint32, key=mx.random.key(1))  # 24 bits are its most
    bits = halves[0] * 2**16 + halves[1]
    mx.eval(noise, bits)
    weights: dict[str, Matrix] = {}
    for name, shape in shapes.items():
        columns = shape[-1]
        format = fit_group(name, columns, quantize) if name in quantizable else None
        if format is not None:
            weights[name] = finish(_quantized(bits, shape, format, dtype))
        elif len(shape) == 1:
            weights[name] = finish(mx.ones(shape, dtype))
        else:
            weights[name] = finish(_repeated(noise * columns**-0.5, shape))
    return weights


def _quantized(
    bits: mx.array, shape: tuple[int, ...], format: Quantization, dtype: mx.Dtype
) -> QuantizedTensor:
    """All values from 0 to ``2 ** bits - 1`` alike, around their middle."""
    packed, groups, _ = (part.shape for part in parts_of("", shape, format))
    most = 2**format.bits - 1
    deviation = math.sqrt(most * (most + 2) / 12)
    scales = mx.full(groups, shape[-1] ** -0.5 / deviation, dtype)
    tensor = QuantizedTensor(
        _repeated(bits, packed), scales, scales * (-most / 2), format.group_size, format.bits
    )
    mx.eval(tensor.packed, tensor.scales, tensor.biases)
    return tensor


def _repeated(piece: mx.array, shape: tuple[int, ...]) -> mx.array:
    count = math.prod(shape)
    array = mx.tile(piece, -(-count // piece.size))[:count].reshape(shape)
    mx.eval(array)
    return array
