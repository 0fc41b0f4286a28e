"""Attention: by hand, with masks and groups, and as transformers computes it."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from tiny_llm.ops.attention import attention, attention_ref, causal_mask
from tiny_llm.ops.backend import use, works


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def by_loops(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, offset: int, grouped: bool = True, window: int = 0
) -> mx.array:
    """The definition, one query head at a time; ungrouped takes KV head h % K, a common mistake."""
    T, H, _ = q.shape
    K = k.shape[1]
    rows = []
    for t in range(T):
        heads = []
        seen = slice(max(0, offset + t + 1 - window) if window else 0, offset + t + 1)
        for h in range(H):
            g = h // (H // K) if grouped else h % K
            scores = mx.sum(q[t, h] * k[seen, g], axis=-1) * scale
            weights = mx.exp(scores - mx.max(scores))
            heads.append(mx.sum((weights / mx.sum(weights))[:, None] * v[seen, g], axis=0))
        rows.append(mx.stack(heads))
    return mx.stack(rows)


@pytest.mark.chapter("1.1")
def test_by_hand() -> None:
    """Scores ln 3 and 0 make weights 3/4 and 1/4."""
    q = mx.array([[[1.0, 0.0]]])
    k = mx.array([[[math.log(3), 0.0]], [[0.0, 1.0]]])
    v = mx.array([[[10.0, 0.0]], [[0.0, 20.0]]])
    assert attention(q, k, v, scale=1.0, offset=1).tolist() == [[pytest.approx([7.5, 5.0])]]


@pytest.mark.chapter("1.1")
def test_heads_do_not_mix(assert_close) -> None:
    q, k, v = normal(5, 3, 8), normal(5, 3, 8, seed=1), normal(5, 3, 8, seed=2)
    alone = [
        attention(q[:, h : h + 1], k[:, h : h + 1], v[:, h : h + 1], scale=0.3, offset=0) for h in range(3)
    ]
    assert_close(attention(q, k, v, scale=0.3, offset=0), mx.concatenate(alone, axis=1))


@pytest.mark.chapter("1.1")
def test_the_definition(assert_close) -> None:
    q, k, v = normal(6, 2, 8), normal(6, 2, 8, seed=1), normal(6, 2, 8, seed=2)
    scale = 8**-0.5
    assert_close(
        attention(q, k, v, scale=scale, offset=0),
        by_loops(q, k, v, scale=scale, offset=0),
        scores_not_scaled=by_loops(q, k, v, scale=1.0, offset=0),
        scores_off_by_sqrt_D=by_loops(q, k, v, scale=1 / 8, offset=0),
        k_and_v_swapped=by_loops(q, v, k, scale=scale, offset=0),
        no_mask=mx.concatenate([by_loops(q[t : t + 1], k, v, scale=scale, offset=5) for t in range(6)]),
    )


@pytest.mark.chapter("1.3")
def test_mask_by_hand() -> None:
    no = -mx.inf
    assert causal_mask(2, 4, offset=2).tolist() == [[0, 0, 0, no], [0, 0, 0, 0]]
    assert causal_mask(3, 3, offset=0).tolist() == [[0, no, no], [0, 0, no], [0, 0, 0]]
    assert causal_mask(2, 4, offset=0).tolist() == [[0, no, no, no], [0, 0, no, no]]


@pytest.mark.chapter("1.1")
@pytest.mark.chapter("1.3")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (14, 2), (3, 3)])
def test_query_heads_share_key_heads_in_groups(assert_close, heads: int, kv_heads: int) -> None:
    q, k, v = normal(3, heads, 4), normal(7, kv_heads, 4, seed=1), normal(7, kv_heads, 4, seed=2)
    scale = 0.5
    mistakes = {}
    if 1 < kv_heads < heads:
        mistakes["query_head_h_read_key_head_h_modulo_K"] = by_loops(
            q, k, v, scale=scale, offset=4, grouped=False
        )
    expected = by_loops(q, k, v, scale=scale, offset=4)
    assert_close(attention(q, k, v, scale=scale, offset=4), expected, **mistakes)


@pytest.mark.chapter("1.3")
@pytest.mark.parametrize("cut", [1, 4, 8])
def test_later_rows_alone_give_what_they_give_together(assert_close, cut: int) -> None:
    q, k, v = normal(9, 4, 8), normal(9, 2, 8, seed=1), normal(9, 2, 8, seed=2)
    together = attention(q, k, v, scale=0.35, offset=0)
    assert_close(
        attention(q[cut:], k, v, scale=0.35, offset=cut),
        together[cut:],
        the_mask_forgets_the_offset=by_loops(q[cut:], k, v, scale=0.35, offset=0),
    )


@pytest.mark.chapter("1.3")
def test_keys_are_not_copied_for_each_query_head() -> None:
    """One token of 16 query heads over 10,000 keys of 2 heads: copies would take 8 times as much."""
    q, k, v = normal(1, 16, 64), normal(10_000, 2, 64, seed=1), normal(10_000, 2, 64, seed=2)
    mx.eval(q, k, v)
    with use("ref"):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(attention(q, k, v, scale=0.125, offset=9_999))
    taken = (mx.get_peak_memory() - before) / (k.nbytes + v.nbytes)
    assert taken < 3, f"it took {taken:.1f} times what keys and values take: they are copied for query heads"


@pytest.mark.chapter("1.1")
@pytest.mark.chapter("1.3")
@pytest.mark.parametrize("size", [100.0, 1e12])
def test_the_future_changes_nothing(size: float) -> None:
    q, k, v = normal(4, 2, 8), normal(4, 2, 8, seed=1), normal(4, 2, 8, seed=2)
    before = attention(q, k, v, scale=0.35, offset=0)[:3]
    k[3], v[3] = mx.full((2, 8), size) * mx.sign(q[:1, :, :1])[0], mx.full((2, 8), -100.0)
    assert mx.array_equal(attention(q, k, v, scale=0.35, offset=0)[:3], before), "a row saw a later key"


@pytest.mark.parametrize("backend", ["ref", "cpu", "mlx"])
@pytest.mark.parametrize("window", [1, 3, 8, 9, 20])
@pytest.mark.parametrize(("rows", "offset"), [(9, 0), (4, 5), (1, 8), (1, 2)])
def test_a_row_sees_its_window(assert_close, backend: str, window: int, rows: int, offset: int) -> None:
    if backend == "cpu" and not works():
        pytest.skip("the CPU kernels were not built: no C++ compiler")
    q, k, v = normal(rows, 4, 8), normal(offset + rows, 2, 8, seed=1), normal(offset + rows, 2, 8, seed=2)
    told = {"scale": 0.35, "offset": offset}
    mistakes = {
        "the_window_is_ignored": by_loops(q, k, v, **told),
        "the_window_is_one_too_wide": by_loops(q, k, v, **told, window=window + 1),
    }
    with use(backend):
        got = attention(q, k, v, **told, window=window)
    hides = {name: value for name, value in mistakes.items() if window < offset + rows}
    assert_close(got, by_loops(q, k, v, **told, window=window), **hides)


@pytest.mark.chapter("1.3")
@pytest.mark.parametrize("case", ["qwen2_tied", "qwen3", "llama_llama3"])
def test_as_transformers(assert_close, activations, case: str) -> None:
    seen = activations(case)
    q, k, v = (seen[f"layer0.{name}"] for name in ("q_rotated", "k_rotated", "v"))
    scale = q.shape[-1] ** -0.5
    assert_close(
        attention(q, k, v, scale=scale, offset=0),
        seen["layer0.attended"],
        scores_not_scaled=by_loops(q, k, v, scale=1.0, offset=0),
    )


@pytest.mark.chapter("1.1")
@pytest.mark.chapter("1.3")
def test_half_precision_comes_back_and_is_summed_in_float32(assert_close) -> None:
    q, k, v = normal(2, 2, 64), normal(300, 1, 64, seed=1), normal(300, 1, 64, seed=2)
    halves = [x.astype(mx.bfloat16) for x in (q, k, v)]
    got = attention(*halves, scale=0.125, offset=298)
    expected = attention(*(x.astype(mx.float32) for x in halves), scale=0.125, offset=298)
    assert got.dtype == mx.bfloat16
    assert_close(got, expected, tolerance=2**-8)


@pytest.mark.chapter("1.1")
@pytest.mark.chapter("1.3")
def test_scores_are_no_half_precision() -> None:
    """64 times 50 times 50 is 160,000, which no float16 is."""
    q, v = mx.full((2, 1, 64), 50.0, dtype=mx.float16), normal(2, 1, 64).astype(mx.float16)
    got = attention(q, q, v, scale=0.125, offset=0)
    assert got.dtype == mx.float16 and not mx.any(mx.isnan(got)).item(), "make scores in float32"
    assert mx.allclose(got[0], v[0], atol=1e-3).item(), "the first token sees itself"
    # Scores of 128 and 128.25, which bfloat16 cannot tell apart.
    q, k, v = mx.array([[[16.0, 1]]]), mx.array([[[8.0, 0]], [[8, 0.25]]]), mx.array([[[0.0, 0]], [[1, 1]]])
    got = attention(*(x.astype(mx.bfloat16) for x in (q, k, v)), scale=1.0, offset=1)
    kept = attention_ref(q, k.astype(mx.bfloat16), v.astype(mx.bfloat16), scale=1.0, offset=1)
    assert kept.dtype == q.dtype, "the result has q's dtype, whatever keys and values are kept in"
    weight = 1 / (1 + math.exp(-0.25))
    assert got.flatten().tolist() == pytest.approx([weight] * 2, abs=3e-3), "take the softmax in float32, too"
    # Twice 60,000 is no float16; times 2 ** -16 it is 1.8.
    q, k, v = mx.array([[[6e4]]]), mx.array([[[2.0**-16]], [[0]]]), mx.array([[[1.0]], [[0]]])
    got = attention_ref(*(x.astype(mx.float16) for x in (q, k, v)), scale=2.0, offset=1).item()
    assert got == pytest.approx(1 / (1 + math.exp(-6e4 * 2.0**-15)), abs=1e-3), (
        "scale the scores, not the queries"
    )
    # e / (1 + e) less 2.71875 / (1 + e) is next to nothing, if the weights keep all their digits.
    q, k, v = mx.array([[[1.0]]]), mx.array([[[1.0]], [[0]]]), mx.array([[[1.0]], [[-2.71875]]])
    got = attention_ref(*(x.astype(mx.bfloat16) for x in (q, k, v)), scale=1.0, offset=1).item()
    assert got == pytest.approx(-0.000126, abs=1e-4), "values are multiplied in float32, too"


@pytest.mark.chapter("1.1")
@pytest.mark.chapter("1.3")
@pytest.mark.parametrize(("start", "end"), [(0, 3), (2, 5), (4, 5)])
def test_offset_says_where_queries_stand_and_not_how_many_keys_there_are(
    assert_close, start: int, end: int
) -> None:
    """Keys behind the last query are no reason to move: a mask of S - T would let it see them."""
    q, k, v = normal(9, 4, 8), normal(9, 2, 8, seed=1), normal(9, 2, 8, seed=2)
    together = attention(q, k, v, scale=0.35, offset=0)
    assert_close(
        attention(q[start:end], k, v, scale=0.35, offset=start),
        together[start:end],
        the_last_query_stands_at_the_last_key=by_loops(
            q[start:end], k, v, scale=0.35, offset=9 - (end - start)
        ),
    )


@pytest.mark.parametrize(
    ("q", "k", "offset", "message"),
    [
        ((2, 4, 8), (2, 2, 6), 0, r"expected q \[T, H, D\] and k, v \[S, K, D\]"),
        ((2, 4, 8), (2, 3, 8), 0, "expected KV heads that divide 4, got 3"),
        ((2, 4, 8), (4, 2, 8), 3, "expected at least 5 keys, got 4"),
    ],
)
def test_wrong_shapes_are_refused(q: tuple[int, ...], k: tuple[int, ...], offset: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(mx.zeros(q), mx.zeros(k), mx.zeros(k), scale=1.0, offset=offset)
