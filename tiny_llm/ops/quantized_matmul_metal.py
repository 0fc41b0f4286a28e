"""Products with quantized matrices by our Metal kernels: with one, with three at once, with a gated pair; and
with one of a stack for each row.

Up to 4 rows go by blocks of 1, 2 or 4, so that a matrix has few kernels; more by tiles where those give a row
the bits that it has alone, else by blocks. Up to 4 blocks are in one threadgroup, so that what one reads of
the matrix is near for the others. Knows no fallback: whoever calls asks ``fits`` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from tiny_llm.data import Matrix, QuantizedTensor
from tiny_llm.ops.backend import active, runs_ours
from tiny_llm.ops.metal import kernel

_MOST_ROWS = 4  # of a block
_ACROSS = 4  # matrices of 8 x 8 along a tile
_CONSTANT = 8  # MLX gives a kernel an array of fewer elements in another address space
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)

Biases = Sequence[mx.array | None]
Quantized = Sequence[QuantizedTensor]


def quantized_of(x: mx.array, weights: Sequence[Matrix], biases: Biases) -> Quantized | None:
    """The matrices if one dispatch can map x [T, I] by all of them: one format, a bias [O] each or none."""
    quantized = [weight for weight in weights if isinstance(weight, QuantizedTensor)]
    given = [bias for bias in biases if bias is not None]
    takes = (
        runs_ours("quantized_matmul")
        and len(quantized) == len(weights)
        and (x.ndim == 2 and x.size > 0 and x.dtype in _FLOATS)
        and all(_alike(weight, quantized[0], x.shape[1]) for weight in quantized)
        and len(given) in (0, len(weights))
        and all(bias.dtype == x.dtype for bias in given)
    )
    if not takes or quantized[0].packed.size < _CONSTANT:
        return None
    arrays = [*given, *(array for w in quantized for array in (w.packed, w.scales))]
    return quantized if len(weights) == 1 or all(a.size >= _CONSTANT for a in arrays) else None


def _alike(weight: QuantizedTensor, first: QuantizedTensor, width: int) -> bool:
    bits, group_size = weight.bits, weight.group_size
    return (
        bits in (4, 8)
        and weight.packed.shape[1] * 32 == width * bits
        and (bits, group_size, weight.scales.dtype) == (first.bits, first.group_size, first.scales.dtype)
        and weight.biases.dtype == weight.scales.dtype
    )


def products(x: mx.array, weights: Quantized, biases: Biases) -> list[mx.array]:
    """Return ``x w^T + bias`` [T, O] for one matrix or for three, of what ``quantized_of`` took."""
    return _run("" if len(weights) == 1 else "_three", x, weights, biases, by_tiles(x.shape[0]))


def gated_product(x: mx.array, weights: Quantized, biases: Biases) -> mx.array:
    """Return ``swiglu(x gate^T + bias, x up^T + bias)`` [T, O] for a pair of equal shapes."""
    return _run("_gated", x, weights, biases, by_tiles(x.shape[0]))[0]


def by_tiles(rows: int) -> bool:
    """Whether so many rows go by tiles."""
    return rows > _MOST_ROWS and matmul_tiles_keep_bits(active())


def stacks_of(x: mx.array, stacks: Sequence[Matrix]) -> Quantized | None:
    """The stacks [N, O, I] if ``expert_products`` can map x [T, I] by a pair of them, and back by a third."""
    quantized = [stack for stack in stacks if isinstance(stack, QuantizedTensor)]
    takes = runs_ours("experts") and len(quantized) == len(stacks) and x.size > 0 and x.dtype in _FLOATS
    formats = {(w.bits, w.scales.dtype, w.biases.dtype) for w in quantized}
    alike = len(formats) == 1 and len({w.group_size for w in quantized[:2]}) == 1  # a pair is read at once
    fit = all(w.bits in (4, 8) and w.scales.size >= _CONSTANT for w in quantized)
    typed = all(w.biases.dtype == w.scales.dtype for w in quantized)
    return quantized if takes and alike and fit and typed else None


def expert_products(x: mx.array, stacks: Quantized, experts: mx.array, count: int) -> mx.array:
    """Return ``x w_e^T`` [P, O], or of two stacks the gated unit, for rows x [P, I] sorted by expert.

    ``experts`` [P] are theirs, of which about ``count`` are equal. Up to 4 rows read a matrix at once.
    """
    P, first, outputs = x.shape[0], stacks[0], stacks[0].packed.shape[1]
    kinds = mx.arange(first.packed.shape[0], dtype=experts.dtype)
    starts = (experts[None] < kinds[:, None]).sum(axis=1).astype(mx.int32)
    halves = len(stacks)
    arrays = [array for w in stacks for array in (w.packed, w.scales, w.biases)]
    return kernel(f"quantized_matmul_experts{'' if halves == 1 else '_gated'}", "quantized_matmul")(
        inputs=[x, *arrays, experts, starts, P, outputs],
        template=[*_formats(x, first), ("R", 1 if count == 1 else 2 if count < 4 else _MOST_ROWS)],
        grid=(32, -(-outputs * halves // 8), P),
        threadgroup=(32, 2, 1),
        output_shapes=[(P, outputs)],
        output_dtypes=[x.dtype],
    )[0]


def _formats(x: mx.array, weight: QuantizedTensor) -> list[tuple[str, mx.Dtype | int]]:
    """What every kernel of products is told of its rows x [T, I] and of its matrices."""
    return [
        ("T", x.dtype),
        ("S", weight.scales.dtype),
        ("I", x.shape[1]),
        ("BITS", weight.bits),
        ("GROUP", weight.group_size),
    ]


def _run(kind: str, x: mx.array, weights: Quantized, biases: Biases, tiles: bool) -> list[mx.array]:
    T = x.shape[0]
    columns = [weight.packed.shape[0] for weight in weights]
    outputs = columns[:1] if kind == "_gated" else columns  # whose pair has one product, half as wide
    half = 2 if kind == "_gated" else 1
    name, sizes, grid, threads = _tiles(T, outputs, half) if tiles else _blocks(T, outputs, half)
    inputs: list[mx.array | int] = [x]
    for weight, bias in zip(weights, biases, strict=True):
        # Where there is no bias, something takes its place.
        inputs += [weight.packed, weight.scales, weight.biases, x if bias is None else bias]
    return kernel(f"{name}{kind}", name)(
        inputs=[*inputs, T, *outputs],
        template=[*_formats(x, weights[0]), ("BIAS", biases[0] is not None), *sizes],
        grid=grid,
        threadgroup=threads,
        output_shapes=[(T, count) for count in outputs],
        output_dtypes=[x.dtype] * len(outputs),
    )


Dispatch = tuple[str, list[tuple[str, int]], tuple[int, int, int], tuple[int, int, int]]


def _blocks(rows: int, outputs: Sequence[int], half: int) -> Dispatch:
    """A simdgroup 8 outputs of a block of rows; the groups of all matrices follow each other."""
    most = min(_MOST_ROWS, 1 << (rows - 1).bit_length())
    blocks = -(-rows // most)
    groups = sum(-(-count * half // 8) for count in outputs)
    return "quantized_matmul", [("R", most)], (32, groups, blocks), (32, 2, min(blocks, 4))


def _tiles(rows: int, outputs: Sequence[int], half: int) -> Dispatch:
    """A threadgroup a tile. Tiles that share what is read of the matrix come after each other."""
    down = 1 if rows <= 8 else 2 if rows <= 16 else 4  # matrices
    across = sum(-(-count * half // (8 * _ACROSS)) for count in outputs)
    grid = (256 * -(-rows // (8 * down)), across, 1)
    return "quantized_matmul_tile", [("M", down), ("N", _ACROSS)], grid, (256, 1, 1)


@cache
def matmul_tiles_keep_bits(backend: str) -> bool:
    """Whether a product may go by tiles on ``backend``: it has some, and a row keeps the bits it has alone.

    Asked of the device, once a process: Apple does not say in which order its matrix instruction sums.
    """
    if backend not in ("metal", "metalsim"):
        return False
    width, outputs = 352, 9  # the 8 parts of a sum are of different lengths
    x = mx.random.normal((5, width), key=mx.random.key(0))
    packed = mx.quantize(mx.random.normal((outputs, width), key=mx.random.key(1)), 32, 4)
    weights = [QuantizedTensor(*packed, 32, 4)]
    (tile,) = _run("", x, weights, [None], tiles=True)
    (block,) = _run("", x[2:3], weights, [None], tiles=False)
    return bool(mx.array_equal(tile[2:3], block).item())
