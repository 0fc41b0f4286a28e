"""A product with a matrix in MLX's affine format, of which each group shares a scale and a bias."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from tiny_llm.data import QuantizedTensor
from tiny_llm.ops.backend import active, cpu, on_mlx
from tiny_llm.ops.metal import kernel, on_metal

_COLUMNS = 2  # outputs that a lane makes
_MOST_ROWS = 16  # rows of x that share what is read of the matrix
_TILE = 4  # matrices of 8 x 8 along each side of a tile


def quantized_matmul_ref(x: mx.array, weight: QuantizedTensor) -> mx.array:
    """Return ``x w^T`` where ``w = scale * q + bias`` group by group; x [T, I], w [O, I], in x's dtype.

    In float32 throughout: with bf16 activations MLX's CPU kernel sums in bf16, 4-10 % off.
    """
    y = mx.quantized_matmul(
        x.astype(mx.float32),
        weight.packed,
        weight.scales.astype(mx.float32),
        weight.biases.astype(mx.float32),
        transpose=True,
        group_size=weight.group_size,
        bits=weight.bits,
    )
    return y.astype(x.dtype)


def quantized_matmul(x: mx.array, weight: QuantizedTensor) -> mx.array:
    """Map x [T, I] by a quantized matrix [O, I] to [T, O]; see ``quantized_matmul_ref``."""
    columns = weight.packed.shape[-1] * 32 // weight.bits
    if columns != x.shape[-1]:
        raise ValueError(f"[quantized_matmul] expected x of {columns} columns, got {x.shape}")
    if not x.size:  # MLX 0.32.4 divides by the number of rows, and ends the process
        return mx.zeros((*x.shape[:-1], weight.packed.shape[0]), x.dtype)
    if x.ndim == 2 and weight.bits in (4, 8) and on_metal("quantized_matmul", x):
        return _metal(x, weight)
    if x.ndim == 2 and weight.bits in (2, 4, 8) and active() == "cpu":
        return _cpu(x, weight)
    return quantized_matmul_mlx(x, weight) if on_mlx() else quantized_matmul_ref(x, weight)


def quantized_matmul_mlx(x: mx.array, weight: QuantizedTensor) -> mx.array:
    """In x's dtype; MLX's kernels for GPUs sum in float32 all the same."""
    y = mx.quantized_matmul(
        x,
        weight.packed,
        weight.scales,
        weight.biases,
        transpose=True,
        group_size=weight.group_size,
        bits=weight.bits,
    )
    return y.astype(x.dtype)


def _cpu(x: mx.array, weight: QuantizedTensor) -> mx.array:
    """By the kernel that reads a matrix as it lies; what models keep is packed, and goes to ``linear``'s."""
    scales, biases = (a.astype(mx.float32) for a in (weight.scales, weight.biases))
    numbers = weight.group_size, weight.bits
    y = cpu.quantized_rows(x.astype(mx.float32), weight.packed, scales, biases, *numbers)
    return y.astype(x.dtype)


def _metal(x: mx.array, weight: QuantizedTensor) -> mx.array:
    """Rows in blocks of a power of two, up to 16; more by tiles, where those give a row the same bits.

    Up to 4 blocks are in one threadgroup, so that what one reads of the matrix is near for the others.
    """
    if x.shape[0] > _MOST_ROWS and matmul_tiles_keep_bits(active()):
        return _tiles(x, weight)
    return _blocks(x, weight)


def _blocks(x: mx.array, weight: QuantizedTensor) -> mx.array:
    T, outputs = x.shape[0], weight.packed.shape[0]
    power_of_two = 1 << (T - 1).bit_length()  # each number of rows is a kernel of its own: few of them
    rows = min(_MOST_ROWS, power_of_two)
    blocks = -(-T // rows)
    column_groups = -(-outputs // (4 * _COLUMNS))
    grid, threads = (32, column_groups, blocks), (32, 2, min(blocks, 4))
    return _run("quantized_matmul", x, weight, [("R", rows), ("COLUMNS", _COLUMNS)], grid, threads)


def _tiles(x: mx.array, weight: QuantizedTensor) -> mx.array:
    """A threadgroup a tile. Tiles that share what is read of the matrix come after each other."""
    side = 8 * _TILE
    down, across = -(-x.shape[0] // side), -(-weight.packed.shape[0] // side)
    grid = (256 * down, across, 1)
    return _run("quantized_matmul_tile", x, weight, [("M", _TILE), ("N", _TILE)], grid, (256, 1, 1))


def _run(
    name: str,
    x: mx.array,
    weight: QuantizedTensor,
    sizes: list[tuple[str, int]],
    grid: tuple[int, int, int],
    threads: tuple[int, int, int],
) -> mx.array:
    (T, width), outputs = x.shape, weight.packed.shape[0]
    (out,) = kernel(name)(
        inputs=[x, weight.packed, weight.scales, weight.biases, T, outputs],
        template=[("T", x.dtype), ("I", width), ("BITS", weight.bits), ("GROUP", weight.group_size), *sizes],
        grid=grid,
        threadgroup=threads,
        output_shapes=[(T, outputs)],
        output_dtypes=[x.dtype],
    )
    return out


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
    weight = QuantizedTensor(*packed, 32, 4)
    return bool(mx.array_equal(_tiles(x, weight)[2:3], _blocks(x[2:3], weight)).item())
