"""Keys and values as int8: what is kept, what attention makes of it, and that a row is nobody else's."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm.data import Pages
from tiny_llm.ops.attention import attention_ref
from tiny_llm.ops.kv_pool import KvFormat, Pool
from tiny_llm.ops.paged_attention import paged_attention, quantized

H, K, D, S, LENGTH = 6, 2, 64, 16, 300


def rows(heads: int, number: int) -> mx.array:
    """[LENGTH, heads, D], some vectors much larger than others, and one of zeros."""
    sizes = mx.exp(2 * mx.random.normal((LENGTH, heads, 1), key=mx.random.key(number + 10)))
    sizes[5] = 0
    return mx.random.normal((LENGTH, heads, D), key=mx.random.key(number)) * sizes


def attended(q: mx.array, k: mx.array, v: mx.array, chunks: list[int]) -> tuple[mx.array, Pool]:
    """One sequence in chunks, through int8 pages whose blocks lie in reverse."""
    blocks = -(-LENGTH // S)
    pool = KvFormat(1, K, D, S, mx.int8, token_major=False).empty_pool(blocks, blocks)
    table, outs, start = mx.arange(blocks - 1, -1, -1, dtype=mx.int32), [], 0
    for count in chunks:
        end = start + count
        places = mx.arange(start, end, dtype=mx.int32)
        pages = Pages(
            slot_mapping=table[places // S] * S + places % S,
            block_tables=table[None],
            query_start_loc=mx.array([0, count], mx.int32),
            context_lens=mx.array([end], mx.int32),
        )
        out, pool = paged_attention(q[start:end], k[start:end], v[start:end], pool, pages)
        outs.append(out)
        start = end
    return mx.concatenate(outs), pool


def test_attention_sees_what_is_kept_and_a_row_only_its_own(backend: str) -> None:
    """A chunk's keys are read back rounded like all others, so chunks change nothing: bits on "cpu"."""
    q, k, v = rows(H, 0) / 8, rows(K, 1), rows(K, 2)
    whole, pool = attended(q, k, v, [LENGTH])
    pieces, again = attended(q, k, v, [1, 90, 1, 1, 7, 150, LENGTH - 250])
    for one, other in zip(pool, again, strict=True):
        assert mx.array_equal(one, other), "what is kept depends on who came with it"
    kept = [
        one.astype(mx.float32) * scales.astype(mx.float32)[..., None]
        for one, scales in map(quantized, (k, v))
    ]
    expected = attention_ref(q, *kept, scale=D**-0.5, offset=0)
    error = mx.max(mx.abs(whole - expected)) / mx.max(mx.abs(expected))
    assert error.item() < 1e-5
    if backend == "cpu":
        assert mx.array_equal(whole, pieces), "a row depends on the rows beside it"
    else:
        assert mx.allclose(whole, pieces, atol=1e-5 * mx.max(mx.abs(expected)).item())


def test_pages_are_the_same_on_every_backend(backend: str) -> None:
    k, v = rows(K, 1), rows(K, 2)
    _, (keys, values, *scales) = attended(rows(H, 0), k, v, [LENGTH])
    for kept, one in ((values, v), (keys.swapaxes(2, 3), k)):
        tokens = kept[::-1].swapaxes(1, 2).reshape(-1, K, D)[:LENGTH]
        assert mx.array_equal(tokens, quantized(one)[0])
    for kept, one in zip(scales, (k, v), strict=True):
        assert mx.array_equal(kept[::-1].swapaxes(1, 2).reshape(-1, K)[:LENGTH], quantized(one)[1])


def test_what_is_kept_is_near() -> None:
    x = rows(K, 3)
    steps, scales = quantized(x)
    unit = scales.astype(mx.float32)[..., None]
    off = mx.abs(steps.astype(mx.float32) * unit - x)
    assert mx.all(off <= 0.57 * unit).item(), "half a step, and what the scale's own rounding adds at 127"
    assert mx.all(mx.isnan(quantized(mx.full((1, 1, D), mx.nan))[1])).item(), "a broken vector is not hidden"


@pytest.mark.parametrize(("dim", "times"), [(64, 1.9), (128, 1.94)])
def test_nearly_twice_as_many_tokens(dim: int, times: float) -> None:
    narrow, wide = (KvFormat(2, K, dim, S, dtype) for dtype in (mx.int8, mx.bfloat16))
    assert wide.token_bytes / narrow.token_bytes >= times
