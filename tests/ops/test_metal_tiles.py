"""Metal kernels of simdgroup matrices: as ``ref``, every access checked, and a row has the bits it has alone.

TINY_LLM_METAL_GRID=full runs every format in every dtype with three seeds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import product

import mlx.core as mx
import pytest

from tiny_llm.data import QuantizedTensor
from tiny_llm.metalsim.build import why_not
from tiny_llm.ops import backend, metal
from tiny_llm.ops import quantized_matmul as matmul
from tiny_llm.ops.quantized_matmul import quantized_matmul, quantized_matmul_ref, tiles_keep_bits

Off = Callable[[mx.array, mx.array], float]
FULL = os.environ.get("TINY_LLM_METAL_GRID") == "full"
SEEDS = range(3) if FULL else range(1)
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# One rounding of the result, and in float32 what another order of a sum makes.
TOLERANCE = {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}
FORMATS = [(bits, group) for bits in (4, 8) for group in (32, 64, 128)]
GPUS = ["metal"] if mx.metal.is_available() else []


@pytest.fixture(autouse=True, params=["metalsim", *GPUS])
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every op of this file runs as Metal: simulated, and on a GPU if there is one."""
    if request.param == "metalsim" and (reason := why_not()):
        pytest.skip(reason)
    with backend.use(request.param) as name:
        yield name


def normal(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def quantized(
    outputs: int, width: int, bits: int, group: int, dtype: mx.Dtype, seed: int = 5
) -> QuantizedTensor:
    weight = normal(outputs, width, seed=seed, dtype=dtype)
    return QuantizedTensor(*mx.quantize(weight, group, bits), group, bits)


def formats() -> Iterator[tuple[int, int, mx.Dtype]]:
    """Bits, group and dtype: each format once, in full each with each."""
    if FULL:
        yield from ((*form, dtype) for form, dtype in product(FORMATS, DTYPES))
    else:
        yield from ((*form, DTYPES[i % 3]) for i, form in enumerate(FORMATS))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("bits", "group", "dtype"), list(formats()), ids=str)
def test_tiles_and_blocks_of_rows_are_as_ref_and_have_the_same_bits(
    bits: int, group: int, dtype: mx.Dtype, seed: int, off: Off
) -> None:
    assert tiles_keep_bits(backend.active()), "the device sums a matrix's products in another order"
    width = 384 if group == 128 else 352 if group == 32 else 320  # parts of different lengths, some empty
    for outputs in (1, 7, 8, 33, 66):
        weight = quantized(outputs, width, bits, group, dtype, seed)
        for rows in (1, 7, 8, 33) if outputs in (7, 33) else (34,):
            x = normal(rows, width, seed=seed + 1, dtype=dtype)
            tiles, blocks = matmul._tiles(x, weight), matmul._blocks(x, weight)
            expected = quantized_matmul_ref(x, weight)
            assert (tiles.shape, tiles.dtype) == (expected.shape, dtype)
            assert off(tiles, expected) < TOLERANCE[dtype], f"{rows} rows, {outputs} outputs"
            assert mx.array_equal(tiles, blocks).item(), f"{rows} rows, {outputs} outputs"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_whatever_the_number_of_rows(dtype: mx.Dtype) -> None:
    x, weight = normal(33, 256, dtype=dtype), quantized(10, 256, 4, 64, dtype)
    every = quantized_matmul(x, weight)
    for rows in (1, 2, 5, 16, 17):
        some = quantized_matmul(x[16 : 16 + rows], weight)
        assert mx.array_equal(some, every[16 : 16 + rows]).item(), f"{rows} rows"


def test_tiles_are_for_more_rows_than_a_block_has(where: str) -> None:
    if where != "metalsim":
        pytest.skip("what runs is seen in the simulator alone")
    assert tiles_keep_bits(where)
    weight = quantized(8, 64, 4, 64, mx.float32)
    with metal.watch() as seen:
        quantized_matmul(normal(16, 64), weight)
        quantized_matmul(normal(17, 64), weight)
    assert [name for name, _ in seen] == ["quantized_matmul", "quantized_matmul_tile"]
    weights = weight.packed.nbytes
    assert seen[1][1].fetched["packed"] == weights, "17 rows are one tile, which fetches each weight once"


def test_a_device_that_sums_in_another_order_gets_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = matmul._tiles
    monkeypatch.setattr(matmul, "_tiles", lambda x, weight: tiles(x, weight) * (1 + 2e-7))
    assert not tiles_keep_bits.__wrapped__(backend.active())
    monkeypatch.setattr(matmul, "tiles_keep_bits", lambda _: False)
    x, weight = normal(33, 64), quantized(9, 64, 4, 64, mx.float32)
    assert mx.array_equal(quantized_matmul(x, weight), matmul._blocks(x, weight)).item()


@pytest.mark.parametrize("name", ["ref", "cpu", "cuda"])
def test_only_metal_has_tiles(name: str) -> None:
    assert not tiles_keep_bits(name)
