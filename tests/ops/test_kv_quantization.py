"""Keys and values in 8 bits, by hand: how a vector is rounded, where it lies, and what is read back."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm.data import Pages
from tiny_llm.ops.attention import attention_ref
from tiny_llm.ops.kv_pool import KvFormat, Pool
from tiny_llm.ops.paged_attention import blocks_read, kv_write_ref, paged_attention_ref, quantized

pytestmark = pytest.mark.chapter("4.2")

K, D, S = 2, 8, 4


def vectors(count: int, number: int, size: float = 1.0) -> mx.array:
    """[count, K, D], the two heads of unlike size."""
    sizes = mx.array([size, 20 * size])[:, None]
    return sizes * mx.random.normal((count, K, D), key=mx.random.key(number))


def pool_of(dtype: mx.Dtype = mx.int8, blocks: int = 5, size: int = S) -> Pool:
    """An empty pool of one layer."""
    arrays = KvFormat(1, K, D, size, dtype, token_major=False).arrays
    return tuple(mx.zeros((blocks, *array.shape), array.dtype) for array in arrays)


def test_a_vectors_largest_entry_becomes_127() -> None:
    steps, scales = quantized(mx.array([[[-254.0, 100.0, 3.2, 0.0]]]))
    assert scales.tolist() == [[2.0]] and scales.dtype == mx.float16, "254 / 127, whatever the sign is"
    assert steps.tolist() == [[[-127, 50, 2, 0]]] and steps.dtype == mx.int8
    assert quantized(mx.array([[[127.0, -1.7, 1.7, 0.4]]]))[0].tolist() == [[[127, -2, 2, 0]]], (
        "to the nearest"
    )
    assert quantized(mx.array([[[127.0, 2.5, -0.5, 3.5]]]))[0].tolist() == [[[127, 2, 0, 4]]], (
        "halves to even"
    )


def test_each_vector_has_a_scale_of_its_own() -> None:
    x = mx.array([[[127.0, 1.0], [1.27, 0.0]], [[2540.0, 0.0], [12.7, 0.1]]])
    steps, scales = quantized(x)
    assert scales.shape == (2, 2) and mx.allclose(scales, mx.array([[1, 0.01], [20, 0.1]]), rtol=1e-3).item()
    assert steps.tolist() == [[[127, 1], [127, 0]], [[127, 0], [127, 1]]]
    alone = quantized(x[1:])
    assert mx.array_equal(alone[0], steps[1:]) and mx.array_equal(alone[1], scales[1:]), "whoever comes along"


def test_integers_are_found_with_the_scale_as_it_is_kept() -> None:
    x = vectors(200, 1)
    steps, scales = quantized(x)
    unit = scales.astype(mx.float32)[..., None]
    assert mx.array_equal(steps, mx.round(x / unit).astype(mx.int8)), "the scale's own rounding is made good"
    assert mx.max(mx.abs(steps.astype(mx.int32))).item() == 127


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_what_comes_in_16_bits_is_rounded_once(dtype: mx.Dtype) -> None:
    x = vectors(200, 2).astype(dtype)
    for got, expected in zip(quantized(x), quantized(x.astype(mx.float32)), strict=True):
        assert mx.array_equal(got, expected), "compute in float32"


def test_zeros_and_what_is_nearly_zero_are_zero() -> None:
    steps, scales = quantized(mx.array([[[0.0, 0.0], [1e-6, -1e-7]]]))
    assert scales.tolist() == [[0, 0]] and steps.tolist() == [[[0, 0], [0, 0]]], "1e-6 / 127 is 0 as float16"


def test_a_small_vector_keeps_its_signs() -> None:
    largest = 127 * 8.8e-8  # the nearest float16 of 8.8e-8 is 5.96e-8: 187 steps
    steps, _ = quantized(mx.array([[[largest, -largest]]]))
    assert steps.tolist() == [[[127, -127]]], "cut, and not turned around"


def test_a_broken_vector_is_not_hidden() -> None:
    assert mx.all(mx.isnan(quantized(mx.full((1, 1, D), mx.nan))[1])).item()
    x = vectors(3, 12)
    whole, scales = quantized(x)
    x[1, 0, 5], x[2, 1, 0] = mx.nan, -mx.inf
    steps, broken = quantized(x)
    assert mx.isnan(broken[1, 0]).item() and mx.isinf(broken[2, 1]).item(), "one number is enough"
    for t, head in ((0, 0), (0, 1), (1, 1), (2, 0)):
        assert mx.array_equal(steps[t, head], whole[t, head]) and broken[t, head] == scales[t, head], (
            "others are not"
        )
    k = mx.full((1, K, D), mx.nan)
    for read in blocks_read(kv_write_ref(pool_of(), k, k, mx.array([5], mx.int32)), mx.array([1], mx.int32)):
        assert mx.all(mx.isnan(read[1])).item() and not mx.any(mx.isnan(read[0])).item()


def test_what_a_block_holds() -> None:
    shapes = {
        array.name: (array.shape, array.dtype) for array in KvFormat(1, 2, 64, 16, mx.int8, False).arrays
    }
    assert shapes == {
        "keys": ((2, 64, 16), mx.int8),
        "values": ((2, 16, 64), mx.int8),
        "keys scales": ((2, 16), mx.float16),
        "values scales": ((2, 16), mx.float16),
    }
    assert list(shapes) == ["keys", "values", "keys scales", "values scales"], "in this order"
    for dtype in (mx.bfloat16, mx.float16, mx.float32):
        wide = KvFormat(1, 2, 64, 16, dtype, False).arrays
        assert wide == (("keys", (2, 64, 16), dtype), ("values", (2, 16, 64), dtype)), "a tuple, no scales"
    for dtype in (mx.float32, mx.int8):
        major = KvFormat(1, 2, 64, 16, dtype, True).arrays
        assert [array[1:] for array in major] == [((16, 2, 64), dtype)] * 2, "and there are no scales"
        assert [array.name for array in major] == ["keys", "values"]


def test_what_a_token_takes() -> None:
    assert KvFormat(24, 2, 64, 16, mx.int8, False).token_bytes == 24 * 2 * 2 * (64 + 2)
    assert KvFormat(24, 2, 64, 16, mx.bfloat16, False).token_bytes == 24 * 2 * 2 * 64 * 2


def test_a_row_is_written_where_its_slot_is() -> None:
    k, v = vectors(3, 3), vectors(3, 4, size=0.1)
    keys, values, k_scales, v_scales = kv_write_ref(pool_of(), k, v, mx.array([6, 7, 16], mx.int32))
    for row, (block, place) in enumerate([(1, 2), (1, 3), (4, 0)]):
        for vector, kept, scale in (
            (k[row : row + 1], keys[block, :, :, place], k_scales[block, :, place]),
            (v[row : row + 1], values[block, :, place], v_scales[block, :, place]),
        ):
            steps, scales = quantized(vector)
            assert mx.array_equal(kept, steps[0]) and mx.array_equal(scale, scales[0])
    assert mx.sum(k_scales > 0).item() == mx.sum(v_scales > 0).item() == 3 * K, "and nowhere else"


@pytest.mark.parametrize("dtype", [mx.int8, mx.bfloat16])
def test_blocks_of_six_are_written_again_and_read_where_a_table_says_so_twice(dtype: mx.Dtype) -> None:
    k, v = (vectors(2, number).astype(mx.bfloat16) for number in (13, 14))
    pool = kv_write_ref(pool_of(dtype, size=6), 3 * v, 2 * k, mx.array([17, 6], mx.int32))
    pool = kv_write_ref(pool, k, v, mx.array([17, 6], mx.int32))
    table = mx.array([1, 2, 1], mx.int32)
    for got, x in zip(blocks_read(pool, table), (k, v), strict=True):
        steps, scales = quantized(x)
        kept = steps * scales.astype(mx.float32)[..., None] if dtype == mx.int8 else x
        assert got.shape == (18, K, D), "a block as often as the table has it"
        assert got.dtype == kept.dtype, "what has no scales is read as it is"
        for row, vector in ((11, kept[0]), (0, kept[1]), (12, kept[1])):
            assert mx.array_equal(got[row], vector), (
                "the last that was written there, and nothing of the first"
            )


def test_pages_without_scales_hold_what_came() -> None:
    k, v = vectors(2, 5), vectors(2, 6)
    pool = kv_write_ref((*pool_of(mx.float32), mx.array(0.0)), k, v, mx.array([9, 2], mx.int32))
    assert len(pool) == 2, "a kernel's mark of its order is no array of the pool"
    own_k, own_v = blocks_read(pool, mx.array([2, 0], mx.int32))
    assert mx.array_equal(own_k[mx.array([1, 6])], k) and mx.array_equal(own_v[mx.array([1, 6])], v)


def test_what_is_read_back_is_near_in_the_tables_order() -> None:
    k, v = vectors(2 * S, 7, size=50), vectors(2 * S, 8, size=0.1)
    table = mx.array([4, 1], mx.int32)
    slots = mx.concatenate([mx.arange(16, 20), mx.arange(4, 8)]).astype(mx.int32)
    own_k, own_v = blocks_read(kv_write_ref(pool_of(), k, v, slots), table)
    for got, x in ((own_k, k), (own_v, v)):
        steps, scales = quantized(x)
        unit = scales.astype(mx.float32)[..., None]
        assert got.shape == (2 * S, K, D) and got.dtype == mx.float32
        assert mx.array_equal(got, steps * unit), "an integer times its scale, in float32"
        assert mx.all(mx.abs(got - x) <= 0.57 * unit).item()


def test_large_keys_stay_finite() -> None:
    k = mx.full((1, K, D), 9e4)
    own_k, _ = blocks_read(kv_write_ref(pool_of(), k, k, mx.array([0], mx.int32)), mx.array([0], mx.int32))
    assert mx.allclose(own_k[:1], k, rtol=1e-2).item(), "no float16 holds 90,000, but a scale of 708 it does"


def test_attention_over_two_sequences_is_that_over_what_is_kept() -> None:
    lens, tables = [7, 3], [[3, 1], [2, 2]]
    k, v, q = vectors(10, 9), vectors(10, 10), vectors(10, 11) / 20
    slots = [S * tables[b][at // S] + at % S for b in (0, 1) for at in range(lens[b])]
    pages = Pages(*(mx.array(one, mx.int32) for one in (slots, tables, [0, 7, 10], lens)))
    out, _ = paged_attention_ref(q, k, v, pool_of(), pages, D**-0.5)
    near = [steps * scales.astype(mx.float32)[..., None] for steps, scales in map(quantized, (k, v))]
    for start, end in ((0, 7), (7, 10)):
        own = [one[start:end] for one in near]
        expected = attention_ref(q[start:end], *own, scale=D**-0.5, offset=0)
        assert mx.allclose(out[start:end], expected, atol=1e-4).item()
