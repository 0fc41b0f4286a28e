"""Attention by matrices of 8 x 8: by hand, ragged edges, who sees what, bits, and how often a key is read."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from tiny_llm.data import Pages
from tiny_llm.metalsim.run import watch
from tiny_llm.ops import paged_attention as attention
from tiny_llm.ops.kv_pool import Pool
from tiny_llm.ops.work_lists import UNBOUNDED, WorkLists

pytestmark = [pytest.mark.usefixtures("where"), pytest.mark.chapter("2.6")]

Inputs = tuple[mx.array, mx.array, mx.array]


def normal(T: int, S: int, H: int = 1, K: int = 1, D: int = 16) -> Inputs:
    shapes = ((T, H, D), (S, K, D), (S, K, D))
    q, k, v = (mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes))
    return q, k, v


def paged(x: mx.array, size: int) -> mx.array:
    """x [S, K, ...] in blocks [N, K, size, ...], the last one first, with NaN where nothing is."""
    missing = mx.full((-x.shape[0] % size, *x.shape[1:]), mx.nan).astype(x.dtype)
    return mx.concatenate([x, missing]).reshape(-1, size, *x.shape[1:]).swapaxes(1, 2)[::-1]


def step(T: int, S: int, size: int) -> WorkLists:
    """One sequence's last T of S tokens."""
    table = mx.arange(-(-S // size), dtype=mx.int32)[::-1][None]
    starts, lens = mx.array([0, T], mx.int32), mx.array([S], mx.int32)
    return WorkLists(Pages(mx.zeros((T,), mx.int32), mx.contiguous(table), starts, lens))


def by_tiles(q: mx.array, k: mx.array, v: mx.array, *, window: int = 0, size: int = 16) -> mx.array:
    pool: Pool = (mx.contiguous(paged(k, size).swapaxes(2, 3)), mx.contiguous(paged(v, size)))
    work = step(q.shape[0], k.shape[0], size)
    return attention._tiles(q, pool, work, q.shape[2] ** -0.5, window or UNBOUNDED)[0]


def defined(q: mx.array, k: mx.array, v: mx.array, *, window: int = 0) -> mx.array:
    """The definition in float64: all scores at once."""
    rows, keys, values = (np.array(x.astype(mx.float32), np.float64) for x in (q, k, v))
    (T, H, D), S = rows.shape, keys.shape[0]
    keys, values = (np.repeat(x, H // x.shape[1], axis=1) for x in (keys, values))
    scores = np.einsum("thd,shd->hts", rows, keys) * D**-0.5
    behind = np.arange(S - T, S)[:, None] - np.arange(S)[None]
    scores[:, (behind < 0) | (behind >= (window or S))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return mx.array(np.einsum("hts,shd->thd", weights, values).astype(np.float32))


def check(got: mx.array, expected: mx.array, tolerance: float = 3e-6) -> None:
    error = mx.abs(got.astype(mx.float32) - expected).max(axis=2) / mx.abs(expected).max()
    wrong = [(t, h) for t, row in enumerate(error.tolist()) for h, e in enumerate(row) if not e <= tolerance]
    assert not wrong, (
        f"{len(wrong)} of {error.size} vectors are off; the first, of row {wrong[0][0]}, begins "
        f"{got[wrong[0]][:3].tolist()}, not {expected[wrong[0]][:3].tolist()}"
    )


def with_scores(scores: Sequence[float]) -> Inputs:
    """One query with those scores, and values that count: token s has s in all columns."""
    k = mx.zeros((len(scores), 1, 16))
    k[:, 0, 0] = 4 * mx.array(scores)
    v = mx.broadcast_to(mx.arange(len(scores))[:, None, None].astype(mx.float32), k.shape)
    return mx.ones((1, 1, 16)), k, v


def test_two_keys_by_hand() -> None:
    """Weights 1 and 3: (0 + 3 * 1) / 4."""
    assert by_tiles(*with_scores([0.0, np.log(3.0)])).tolist()[0][0] == pytest.approx([0.75] * 16)


def test_each_element_of_a_matrix_is_where_a_lane_looks_for_it() -> None:
    """Query t asks for column t alone, and 16 keys have 1 in a column each: query t gets value t."""
    eye = mx.eye(16)[:, None]
    v = mx.arange(256).reshape(16, 1, 16).astype(mx.float32)
    k = mx.concatenate([400 * eye, mx.zeros((16, 1, 16))])
    got = by_tiles(eye, k, mx.concatenate([v, v]))
    assert mx.abs(got - v).max().item() < 1e-3, f"query 1 got {got[1, 0].tolist()}, not {v[1, 0].tolist()}"


@pytest.mark.parametrize(("T", "S"), [(1, 20), (7, 23), (8, 8), (17, 60), (20, 300)])
def test_ragged_edges(T: int, S: int) -> None:
    """Rows that do not fill a tile, blocks that are not full: what lies behind is NaN."""
    inputs = normal(T, S)
    check(by_tiles(*inputs), defined(*inputs))


def test_scores_of_any_size() -> None:
    for level in (-300.0, 90.0, 1000.0):
        scores = [level + (np.log(2.0) if s >= 20 else 0.0) for s in range(40)]
        got = by_tiles(*with_scores(scores)).tolist()[0][0]
        assert got == pytest.approx([(9.5 + 2 * 29.5) / 3] * 16, rel=1e-3), f"at a level of {level:g}"


def test_one_key_that_is_far_ahead_wins_wherever_it_lies() -> None:
    """In each block of a part, in each part, in each span; others come before it and after it."""
    for at, lead in ((0, 40), (3, 120), (70, 120), (100, 40), (140, 120), (215, 40), (279, 120)):
        scores = [-3.0] * 280
        scores[at] += lead
        got = by_tiles(*with_scores(scores)).tolist()[0][0]
        assert got == pytest.approx([at] * 16, rel=1e-4, abs=1e-4), f"token {at} is {lead} ahead"


@pytest.mark.parametrize("window", [1, 3, 18, 130])
def test_a_window(window: int) -> None:
    """Rows whose windows begin in later blocks than the tile; what all of them have left behind is NaN."""
    q, k, v = normal(20, 290)
    gone = mx.arange(290)[:, None, None] < 290 - 20 - window + 1
    got = by_tiles(q, *(mx.where(gone, mx.nan, x) for x in (k, v)), window=window)
    check(got, defined(q, k, v, window=window))


def test_heads_that_share_a_key_head() -> None:
    """Three query heads to each of two key heads, which make tiles of rows and heads; 24 columns."""
    inputs = normal(7, 45, H=6, K=2, D=24)
    check(by_tiles(*inputs), defined(*inputs))


def test_bfloat16_rounds_once() -> None:
    q, k, v = (x.astype(mx.bfloat16) for x in normal(9, 50))
    check(by_tiles(q, k, v), defined(q, k, v), tolerance=4e-3)


def test_scales_of_int8() -> None:
    q, *_ = normal(9, 50)
    ints = [mx.random.randint(-127, 128, (50, 1, 16), key=mx.random.key(i)).astype(mx.int8) for i in (1, 2)]
    scales = [
        mx.random.uniform(0.002, 0.03, (50, 1), key=mx.random.key(i)).astype(mx.float16) for i in (3, 4)
    ]
    k, v = (x.astype(mx.float32) * s[..., None].astype(mx.float32) for x, s in zip(ints, scales, strict=True))
    keys, values = (paged(x, 16) for x in ints)
    pool: Pool = (
        mx.contiguous(keys.swapaxes(2, 3)),
        *(mx.contiguous(x) for x in (values, *(paged(s, 16) for s in scales))),
    )
    got = attention._tiles(q, pool, step(9, 50, 16), 0.25)[0]
    check(got, defined(q, k, v))


def test_rows_have_the_bits_of_decodes(where: str) -> None:
    """In blocks of 64, of which a decode's lane has two tokens: by which order they are added shows."""
    if where != "metalsim":
        pytest.skip("a GPU's matrix instruction may sum in another order; then tiles are not used")
    q, k, v = normal(9, 200, D=8)
    together = by_tiles(q, k, v, size=64)
    pool: Pool = (mx.contiguous(paged(k, 64).swapaxes(2, 3)), mx.contiguous(paged(v, 64)))
    decoded = attention._rows(q, pool, step(9, 200, 64), 8**-0.5)[0]
    differing = mx.mean(together != decoded).item()
    assert differing == 0, f"{differing:.0%} of the numbers have other bits than the decode kernel's"


def test_a_key_is_read_once_for_all_queries_of_a_tile(where: str) -> None:
    if where != "metalsim":
        pytest.skip("a GPU does not say what it reads")
    inputs = normal(16, 64)
    with watch() as seen:
        by_tiles(*inputs)
    ((_, traffic),) = seen
    whole = 64 * 16 * 4  # tokens, columns, bytes
    assert traffic.read["keys"] == whole, "each key's bytes once for 16 queries"
    assert traffic.read["values"] == whole, "each value's bytes once for 16 queries"
