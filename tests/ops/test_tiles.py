"""A product by tiles: every place, ragged edges, weights loaded once, and sums in an order of their own."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from tiny_llm.data import QuantizedTensor
from tiny_llm.metalsim.run import Traffic, watch
from tiny_llm.ops import quantized_matmul_metal as matmul

pytestmark = [pytest.mark.usefixtures("where"), pytest.mark.chapter("2.8")]

INPUTS = 352  # 11 chunks for 8 simdgroups: three have two of them, five have one


def normal(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def quantized(outputs: int, *, bits: int = 4, dtype: mx.Dtype = mx.float32, seed: int = 5) -> QuantizedTensor:
    weight = normal(outputs, INPUTS, seed=seed, dtype=dtype) + 0.3
    return QuantizedTensor(*mx.quantize(weight, group_size=32, bits=bits), 32, bits)


def dense(weight: QuantizedTensor) -> mx.array:
    arrays = (weight.packed, weight.scales.astype(mx.float32), weight.biases.astype(mx.float32))
    return mx.dequantize(*arrays, group_size=32, bits=weight.bits)


def product(x: mx.array, weight: QuantizedTensor, *, bias: mx.array | None = None) -> mx.array:
    return matmul._run("", x, [weight], [bias], tiles=True)[0]


def watched(x: mx.array, weight: QuantizedTensor) -> Traffic:
    with watch() as seen:
        product(x, weight)
    if not seen:
        pytest.skip("a GPU does not say what it reads")
    return seen[0][1]


def check(got: mx.array, expected: mx.array, tolerance: float = 3e-6) -> None:
    assert got.shape == expected.shape
    error = mx.abs(got.astype(mx.float32) - expected) / mx.abs(expected).max()
    wrong = np.argwhere(~(np.array(error) <= tolerance)).tolist()
    if wrong:
        row, output = wrong[0]
        first = f"output {output} of row {row}, is {got[row, output].item():g}"
        pytest.fail(f"{len(wrong)} of {error.size} are off; {first}, not {expected[row, output].item():g}")


def test_each_weight_is_where_a_lane_looks_for_it() -> None:
    """Row r has a 1 at one input and asks for its weights: of all places of a chunk, and of the last one."""
    weight = quantized(33)
    for first in (0, 16, INPUTS - 16):
        x = mx.concatenate([mx.zeros((16, first)), mx.eye(16), mx.zeros((16, INPUTS - 16 - first))], axis=1)
        check(product(x, weight), dense(weight)[:, first : first + 16].T)


@pytest.mark.parametrize(("rows", "outputs"), [(1, 1), (5, 7), (8, 32), (9, 33), (16, 30), (40, 33)])
def test_ragged_edges(rows: int, outputs: int) -> None:
    """What does not fill a tile is neither read nor stored beyond its array."""
    x, weight = normal(rows, INPUTS), quantized(outputs)
    check(product(x, weight), x @ dense(weight).T)


def test_fewer_chunks_than_simdgroups() -> None:
    """Two chunks for eight: the others have nothing, and zeros are what they add."""
    x, weight = normal(5, 64), normal(9, 64, seed=5)
    packed = mx.quantize(weight, 64, 4)
    check(product(x, QuantizedTensor(*packed, 64, 4)), x @ mx.dequantize(*packed, 64, 4).T)


def test_8_bits_and_a_bias_in_bfloat16() -> None:
    """A whole sum is float; it is rounded, then its bias is added, and rounded again."""
    x, weight = normal(6, INPUTS, dtype=mx.bfloat16), quantized(35, bits=8, dtype=mx.bfloat16)
    bias = 3 * normal(35, seed=7, dtype=mx.bfloat16)
    exact = x.astype(mx.float32) @ dense(weight).T
    got = product(x, weight, bias=bias)
    check(got, exact + bias.astype(mx.float32), 8e-3)
    differing = mx.mean(got != exact.astype(mx.bfloat16) + bias).item()
    assert differing < 0.1, f"{differing:.0%} of the outputs are not the rounded sum plus the bias, rounded"


def test_the_two_halves_of_a_tile_may_be_of_two_matrices() -> None:
    """A gated unit's: the gate's columns on the left, the other matrix's on the right."""
    x, gate, up = normal(5, INPUTS) / 8, quantized(19), quantized(19, seed=6)
    got = matmul.gated_product(x, [gate, up], [None, None])
    first, second = (x @ dense(weight).T for weight in (gate, up))
    check(got, first / (1 + mx.exp(-first)) * second, 1e-5)


@pytest.mark.parametrize("rows", [5, 8, 9, 16, 21])
def test_a_row_has_the_bits_that_it_has_alone(where: str, rows: int) -> None:
    """By the kernel of few rows, whose eight lanes take the chunks in turns and add up in pairs."""
    if where != "metalsim":
        pytest.skip("a GPU's matrix instruction may sum in another order; then tiles are not used")
    x, weight = normal(rows, INPUTS, seed=rows), quantized(33)
    together = product(x, weight)
    alone = [matmul._run("", x[r : r + 1], [weight], [None], tiles=False)[0] for r in range(rows)]
    differing = mx.mean(together != mx.concatenate(alone)).item()
    assert differing == 0, f"{differing:.0%} of the numbers have other bits than a row alone"


def test_a_weights_bytes_are_loaded_once_for_all_rows_of_a_tile() -> None:
    weight = quantized(64)
    few, many, three = (watched(normal(rows, INPUTS), weight) for rows in (8, 16, 40))
    for name in ("packed", "scales", "biases"):
        assert many.read[name] == few.read[name], f"{name}: 16 rows load what 8 rows load"
    assert few.fetched["packed"] == many.fetched["packed"] == weight.packed.nbytes, (
        "each tile its own columns"
    )
    assert three.fetched["packed"] == 2 * weight.packed.nbytes, "two tiles one above the other"
    assert many.read["x"] == 2 * 16 * INPUTS * 4, (
        "each number of x once for each of the two tiles of 32 outputs"
    )
    assert many.written["out"] == 16 * 64 * 4, "each output once"


def test_a_barrier_a_round() -> None:
    """The sums of eight parts become one in three rounds, and nobody waits twice in one."""
    threads = 256
    assert watched(normal(8, INPUTS), quantized(32)).barriers == 3 * threads


def tile(rows: int, *outputs: int, half: int = 1) -> tuple[dict[str, int], tuple[int, ...], tuple[int, ...]]:
    name, sizes, grid, threads = matmul._tiles(rows, outputs, half)
    assert name == "quantized_matmul_tile"
    return dict(sizes), grid, threads


def test_a_grid_has_a_threadgroup_for_each_tile() -> None:
    assert tile(32, 64) == ({"M": 4, "N": 4}, (256, 2, 1), (256, 1, 1)), "32 rows, two tiles across"
    assert tile(33, 65)[1] == (512, 3, 1), "a row more, an output more: 2 x 3 tiles"
    assert tile(100, 4864)[1] == (1024, 152, 1)
    assert tile(40, 40, 10, 17)[1] == (512, 4, 1), "of three matrices: 2, 1 and 1 tile across"
    assert tile(40, 21, half=2)[1] == (512, 2, 1), "a gated pair has 42 columns"


def test_few_rows_have_low_tiles() -> None:
    heights = [tile(rows, 64)[0]["M"] for rows in (1, 8, 9, 16, 17, 1000)]
    assert heights == [1, 1, 2, 2, 4, 4], "8, 16 or 32 rows: no more than twice those that there are"


def test_how_the_inputs_are_split_depends_on_no_shape() -> None:
    sizes = [tile(rows, outputs)[2] for rows in (5, 40, 999) for outputs in (1, 64, 9999)]
    assert all(one == other for one, other in pairwise(sizes)), "8 simdgroups share each tile's inputs"
