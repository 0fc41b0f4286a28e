"""Metal kernels of simdgroup matrices: as ``ref``, every access checked, and a row has the bits it has alone.

TINY_LLM_METAL_GRID=full runs every format in every dtype with three seeds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import product as pairs
from typing import Any

import mlx.core as mx
import pytest

from tiny_llm.data import Pages, QuantizedTensor
from tiny_llm.metalsim.run import Traffic, watch
from tiny_llm.ops import backend
from tiny_llm.ops import paged_attention as attention
from tiny_llm.ops import quantized_matmul_metal as matmul
from tiny_llm.ops.kv_pool import Pool
from tiny_llm.ops.linear import gated, linear, linears
from tiny_llm.ops.paged_attention import paged_attention, paged_attention_ref
from tiny_llm.ops.quantized_matmul import quantized_matmul, quantized_matmul_ref
from tiny_llm.ops.quantized_matmul_metal import matmul_tiles_keep_bits
from tiny_llm.ops.swiglu import swiglu
from tiny_llm.ops.work_lists import WorkLists

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("where")]

Off = Callable[[mx.array, mx.array], float]
FULL = os.environ.get("TINY_LLM_METAL_GRID") == "full"
SEEDS = range(3) if FULL else range(1)
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# One rounding of the result, and in float32 what another order of a sum makes.
TOLERANCE = {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}
FORMATS = [(bits, group) for bits in (4, 8) for group in (32, 64, 128)]


def normal(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def quantized(
    outputs: int, width: int, bits: int, group: int, dtype: mx.Dtype, seed: int = 5
) -> QuantizedTensor:
    weight = normal(outputs, width, seed=seed, dtype=dtype)
    return QuantizedTensor(*mx.quantize(weight, group, bits), group, bits)


def product(x: mx.array, weight: QuantizedTensor, *, tiles: bool) -> mx.array:
    return matmul._run("", x, [weight], [None], tiles)[0]


def formats() -> Iterator[tuple[int, int, mx.Dtype]]:
    """Bits, group and dtype: each format once, in full each with each."""
    if FULL:
        yield from ((*form, dtype) for form, dtype in pairs(FORMATS, DTYPES))
    else:
        yield from ((*form, DTYPES[i % 3]) for i, form in enumerate(FORMATS))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("bits", "group", "dtype"), list(formats()), ids=str)
def test_tiles_and_blocks_of_rows_are_as_ref_and_have_the_same_bits(
    bits: int, group: int, dtype: mx.Dtype, seed: int, off: Off
) -> None:
    assert matmul_tiles_keep_bits(backend.active()), "the device sums a matrix's products in another order"
    width = 384 if group == 128 else 352 if group == 32 else 320  # parts of different lengths, some empty
    for outputs in (1, 7, 8, 33, 66):
        weight = quantized(outputs, width, bits, group, dtype, seed)
        for rows in (1, 7, 8, 33) if outputs in (7, 33) else (34,):
            x = normal(rows, width, seed=seed + 1, dtype=dtype)
            tiles, blocks = product(x, weight, tiles=True), product(x, weight, tiles=False)
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
    assert matmul_tiles_keep_bits(where)
    weight = quantized(8, 64, 4, 64, mx.float32)
    with watch() as seen:
        for rows in (4, 5, 32):
            quantized_matmul(normal(rows, 64), weight)
    assert [name for name, _ in seen] == ["quantized_matmul", *["quantized_matmul_tile"] * 2]
    for _, traffic in seen:
        assert traffic.fetched["packed"] == weight.packed.nbytes, "one block or tile fetches each weight once"


def test_a_device_that_sums_in_another_order_gets_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    run = matmul._run

    def other(kind: str, x: mx.array, weights: Any, biases: Any, tiles: bool) -> list[mx.array]:
        return [out * (1 + 2e-7 * tiles) for out in run(kind, x, weights, biases, tiles)]

    monkeypatch.setattr(matmul, "_run", other)
    assert not matmul_tiles_keep_bits.__wrapped__(backend.active())
    monkeypatch.setattr(matmul, "matmul_tiles_keep_bits", lambda _: False)
    x, weight = normal(33, 64), quantized(9, 64, 4, 64, mx.float32)
    assert mx.array_equal(quantized_matmul(x, weight), product(x, weight, tiles=False)).item()


def names(seen: Sequence[tuple[str, Traffic]]) -> list[str]:
    return [name for name, _ in seen]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9, 33])
@pytest.mark.parametrize(("bits", "group", "dtype"), [(4, 64, mx.bfloat16), (8, 32, mx.float32)], ids=str)
def test_q_k_v_and_the_gated_pair_are_a_dispatch_each_with_the_bits_of_single_products(
    rows: int, bits: int, group: int, dtype: mx.Dtype, where: str
) -> None:
    x = normal(rows, 192, dtype=dtype)
    weights = [quantized(outputs, 192, bits, group, dtype, seed) for seed, outputs in enumerate((40, 10, 17))]
    pair = [quantized(21, 192, bits, group, dtype, seed) for seed in (3, 4)]
    for biased in (True, False):
        biases = [
            normal(w.packed.shape[0], seed=9, dtype=dtype) if biased else None for w in (*weights, *pair)
        ]
        with watch() as seen:
            together = [*linears(x, weights, biases[:3]), gated(x, *pair, *biases[3:])]
        suffix = "_tile" if rows > 4 else ""
        if where == "metalsim":
            assert names(seen) == [f"quantized_matmul{suffix}_three", f"quantized_matmul{suffix}_gated"]
        single = [linear(x, w, bias) for w, bias in zip((*weights, *pair), biases, strict=True)]
        alone = [*single[:3], swiglu(*single[3:])]
        plain = [quantized_matmul(x, w) for w in (*weights, *pair)]
        added = [y if b is None else y + b for y, b in zip(plain, biases, strict=True)]
        for got, expected in zip((*together, *single), (*alone, *added), strict=True):
            assert (got.shape, got.dtype) == (expected.shape, dtype)
            assert mx.array_equal(got, expected).item(), f"bias: {biased}"


def test_products_that_no_single_dispatch_takes_are_made_one_by_one(where: str, off: Off) -> None:
    if where != "metalsim":
        pytest.skip("what runs is seen in the simulator alone")
    x = normal(2, 128)
    usual = quantized(16, 128, 4, 64, mx.float32)
    others = {
        "bits": quantized(16, 128, 8, 64, mx.float32),
        "group size": quantized(16, 128, 4, 32, mx.float32),
        "scales": quantized(16, 128, 4, 64, mx.float16),
        "dense": normal(16, 128, seed=3),
        "6 bits": quantized(16, 128, 6, 64, mx.float32),
        "few": quantized(3, 128, 4, 64, mx.float32),
    }
    for what, other in others.items():
        with watch() as seen:
            got = [*linears(x, [usual, other, usual], [None] * 3)]
            got += [] if what == "few" else [gated(x, usual, other, None, None)]
        assert not [name for name in names(seen) if "three" in name or "gated" in name], what
        with backend.use("ref"):
            wanted = [*linears(x, [usual, other, usual], [None] * 3)]
            wanted += [] if what == "few" else [gated(x, usual, other, None, None)]
        assert all(off(g, w) < 3e-6 for g, w in zip(got, wanted, strict=True)), what
    bias = normal(16, seed=4)
    with watch() as seen:
        got = linears(x, [usual] * 3, [bias, None, bias])
    assert names(seen) == ["quantized_matmul"] * 3, "a bias each or none"


def test_loads_of_a_decode_row_are_wide(where: str) -> None:
    """A lane takes 32 inputs of two columns in 14 loads: 2 of weights, 8 of x, 4 of scales and biases.

    By 4 bytes of weights and one number of x they were 44.
    """
    if where != "metalsim":
        pytest.skip("what runs is seen in the simulator alone")
    weight = quantized(16, 512, 4, 64, mx.bfloat16)
    with watch() as seen:
        quantized_matmul(normal(1, 512, dtype=mx.bfloat16), weight)
        quantized_matmul(normal(32, 512, dtype=mx.bfloat16), weight)
    (_, block), (_, tile) = seen
    chunks = 16 // 2 * 512 // 32  # lanes' columns, chunks
    assert block.loads["packed"] == block.loads["scales"] == block.loads["biases"] == 2 * chunks
    assert block.loads["x"] == 8 * chunks
    lanes = 32 * 512 // 32  # of a tile, each with 2 places of 4 matrices
    assert tile.loads["packed"] == tile.loads["scales"] == 8 * lanes, "16 bytes each"
    assert tile.loads["x"] == 16 * lanes, "two numbers each"


@pytest.mark.parametrize("name", ["ref", "cpu", "cuda"])
def test_only_metal_has_tiles(name: str) -> None:
    assert not matmul_tiles_keep_bits(name) and not attention.attention_tiles_keep_bits(name, scaled=False)


Case = tuple[mx.array, mx.array, mx.array, Pool, Pages]


def paged(
    lens: list[int],
    new: list[int],
    H: int,
    K: int,
    D: int,
    S: int,
    dtype: mx.Dtype,
    seed: int = 0,
    *,
    int8: bool = False,
) -> Case:
    """Sequences of ``lens`` tokens, of which the last ``new`` are queries; their blocks alternate.

    What the pool holds beyond the last token is NaN, or of int8 its scale is: no row may see it.
    """
    B, W = len(lens), max(-(-length // S) for length in lens)
    tables = [[i * B + b for i in range(W)] for b in range(B)]
    slots = [tables[b][p // S] * S + p % S for b, end in enumerate(lens) for p in range(end - new[b], end)]
    starts = [sum(new[:b]) for b in range(B + 1)]
    pages = Pages(*(mx.array(x, mx.int32) for x in (slots, tables, starts, lens)))
    known = mx.arange(W * S)[None] < mx.array(lens)[:, None]  # [B, W * S]
    known = known.reshape(B, W, S).swapaxes(0, 1).reshape(W * B, 1, S)
    T, key = sum(new), 4 * seed
    q, k, v = (normal(T, heads, D, seed=key + n, dtype=dtype) for n, heads in enumerate((H, K, K)))
    keys = mx.where(known[:, :, None], normal(W * B, K, D, S, seed=key + 3), mx.nan).astype(dtype)
    values = mx.where(known[..., None], normal(W * B, K, S, D, seed=key + 4), mx.nan).astype(dtype)
    if not int8:
        return q, k, v, (keys, values), pages
    scales = mx.where(known, mx.abs(normal(W * B, K, S, seed=key + 5)) / 30, mx.nan).astype(mx.float16)
    steps = [(25 * mx.where(mx.isnan(one), 4, one)).astype(mx.int8) for one in (keys, values)]
    return q, k, v, (*steps, scales, 2 * scales), pages


# New rows of 1, 7, 8, 33, with and without tokens before them; two spans; heads that share and do not.
# Half of them unless in full.
BATCHES: list[tuple[list[int], list[int], int, int]] = [
    ([1], [1], 1, 1),
    ([7, 40], [7, 1], 6, 2),
    ([41, 8, 3], [8, 8, 1], 3, 3),
    ([290], [33], 2, 1),
]


def heads() -> Iterator[tuple[int, int, mx.Dtype]]:
    """Head dim, tokens a block and dtype: each dim once, in full each with each."""
    dims = (64, 80, 96, 128, 256)
    if FULL:
        yield from pairs(dims, (16, 32), DTYPES)
    else:
        yield from ((dim, (16, 32)[i % 2], DTYPES[i % 3]) for i, dim in enumerate(dims))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize(("D", "S", "dtype"), list(heads()), ids=str)
def test_tiles_and_rows_of_attention_are_as_ref_and_have_the_same_bits(
    D: int, S: int, dtype: mx.Dtype, int8: bool, seed: int, off: Off
) -> None:
    assert attention.attention_tiles_keep_bits(backend.active(), scaled=int8), (
        "the device sums in another order"
    )
    scale = D**-0.5
    for lens, new, H, K in BATCHES if FULL else BATCHES[D // 16 % 3 % 2 :: 2]:
        q, k, v, pool, pages = paged(lens, new, H, K, D, S, dtype, seed, int8=int8)
        expected = paged_attention_ref(q, k, v, tuple(map(mx.array, pool)), pages, scale)[0]
        written = attention.kv_write(pool, k, v, pages.slot_mapping)
        tiles, rows = (
            attend(q, written, WorkLists(pages), scale)[0] for attend in (attention._tiles, attention._rows)
        )
        assert (tiles.shape, tiles.dtype) == (expected.shape, dtype)
        assert off(tiles, expected) < TOLERANCE[dtype], f"{new} of {lens}"
        assert mx.array_equal(tiles, rows).item(), f"{new} of {lens}"


@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prompt_has_the_same_bits_whole_or_in_chunks(dtype: mx.Dtype, int8: bool) -> None:
    length, H, K, D, S = 41, 4, 2, 64, 16
    q, k, v, pool, pages = paged([length], [length], H, K, D, S, dtype, int8=int8)
    whole = paged_attention(q, k, v, pool, pages)[0]
    begin, pool = 0, paged([length], [length], H, K, D, S, dtype, int8=int8)[3]
    for end in (1, 8, 9, 41):  # chunks of 1, 7, 1, 32
        part = slice(begin, end)
        one = Pages(
            pages.slot_mapping[part],
            pages.block_tables,
            mx.array([0, end - begin], mx.int32),
            mx.array([end], mx.int32),
        )
        out, pool = paged_attention(q[part], k[part], v[part], pool, one)
        assert mx.array_equal(out, whole[part]).item(), f"rows {begin} to {end}"
        begin = end


def test_pages_are_read_once_for_all_queries_of_a_tile(where: str) -> None:
    if where != "metalsim":
        pytest.skip("what runs is seen in the simulator alone")
    assert attention.attention_tiles_keep_bits(where, scaled=False)
    q, k, v, pool, pages = paged([64], [4], 8, 2, 64, 16, mx.bfloat16)  # 16 pairs for each of the 2 heads
    with watch() as seen:
        paged_attention(q, k, v, pool, pages)
    name, traffic = seen[-1]
    assert len(seen) == 2, "a write, and all rows at once"
    assert name == "paged_attention_tile"
    assert (
        traffic.fetched["keys"] == traffic.fetched["values"] == 64 * 2 * 64 * 2
    )  # tokens, heads, dim, bytes
