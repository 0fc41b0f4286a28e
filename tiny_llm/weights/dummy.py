"""Random weights in the shapes of a model, to measure with where there is no checkpoint.

Owns their making, which is quick: one piece of noise, again and again. Logits are finite and mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType

import mlx.core as mx

from tiny_llm.config import Quantization
from tiny_llm.data import Matrix, QuantizedTensor
from tiny_llm.weights.assemble import Finish
from tiny_llm.weights.quantize import fit_group, parts_of

PIECE = 2**20 + 7  # values of noise; no row's length divides it, so that rows differ


def dummy_weights(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: mx.Dtype,
    quantize: Quantization | None,
    quantizable: Collection[str],
    finish: Finish = lambda weight: weight,
    parts: Mapping[str, range] = MappingProxyType({}),
) -> dict[str, Matrix]:
    """Return a random tensor for each name and shape, as ``load_weights`` would return a checkpoint's.

    Matrices have a standard deviation of ``1 / sqrt(columns)``, so that a product keeps its input's
    size; vectors are ones. Floats are of ``dtype``. ``parts``: the rows to make of tensors of which not all
    are wanted. Large ones come first, as a checkpoint's do: what they are made of is then in memory while
    little else is.
    """
    noise = mx.random.normal((PIECE,), key=mx.random.key(0)).astype(dtype)
    halves = mx.random.randint(0, 2**16, (2, PIECE), mx.uint32, key=mx.random.key(1))  # 24 bits are its most
    bits = halves[0] * 2**16 + halves[1]
    mx.eval(noise, bits)
    weights: dict[str, Matrix] = {}
    for name, shape in sorted(shapes.items(), key=lambda entry: -math.prod(entry[1])):
        columns, rows = shape[-1], parts.get(name)
        if rows == range(0):
            continue
        format = fit_group(name, columns, quantize) if name in quantizable else None
        if format is not None:
            weights[name] = finish(_quantized(bits, shape, format, dtype, rows))
        elif len(shape) == 1:
            weights[name] = finish(mx.ones(shape if rows is None else (len(rows),), dtype))
        else:
            weights[name] = finish(_repeated(noise * columns**-0.5, shape, rows))
    return weights


def _quantized(
    bits: mx.array, shape: tuple[int, ...], format: Quantization, dtype: mx.Dtype, rows: range | None
) -> QuantizedTensor:
    """All values from 0 to ``2 ** bits - 1`` alike, around their middle."""
    packed, groups, _ = (part.shape for part in parts_of("", shape, format))
    most = 2**format.bits - 1
    deviation = math.sqrt(most * (most + 2) / 12)
    words = _repeated(bits, packed, rows)
    scales = mx.full((*words.shape[:-1], groups[-1]), shape[-1] ** -0.5 / deviation, dtype)
    tensor = QuantizedTensor(words, scales, scales * (-most / 2), format.group_size, format.bits)
    mx.eval(tensor.packed, tensor.scales, tensor.biases)
    return tensor


def _repeated(piece: mx.array, shape: tuple[int, ...], rows: range | None) -> mx.array:
    """The piece again and again in this shape, or some rows of that."""
    own = rows or range(shape[-2])
    if len(shape) == 2:  # they begin in the middle of a piece
        piece = mx.roll(piece, -(own.start * shape[1] % piece.size))
        shape = (len(own), shape[1])
    count = math.prod(shape)
    array = mx.tile(piece, -(-count // piece.size))[:count].reshape(shape)
    array = array[:, own.start : own.stop] if len(shape) > 2 else array
    mx.eval(array)
    return array
