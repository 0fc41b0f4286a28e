"""Online softmax over spans of 256 keys: by hand, scores of any size, what rows see, bits that are theirs."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tiny_llm.ops.attention import attention

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.chapter("2.5")]

Inputs = tuple[mx.array, mx.array, mx.array]


def normal(T: int, S: int, H: int, K: int, D: int, *, seed: int = 0) -> Inputs:
    q, k, v = (
        mx.random.normal(shape, key=mx.random.key(3 * seed + i))
        for i, shape in enumerate(((T, H, D), (S, K, D), (S, K, D)))
    )
    return q, k, v


def defined(q: mx.array, k: mx.array, v: mx.array, *, window: int = 0) -> mx.array:
    """The definition in float64: all scores at once."""
    rows, keys, values = (np.array(x.astype(mx.float32), np.float64) for x in (q, k, v))
    (T, H, D), S = rows.shape, keys.shape[0]
    keys, values = (np.repeat(x, H // x.shape[1], axis=1) for x in (keys, values))
    scores = np.einsum("thd,shd->hts", rows, keys) * D**-0.5
    behind = np.arange(S - T, S)[:, None] - np.arange(S)[None]
    scores[:, (behind < 0) | (behind >= (window or S))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return mx.array(
        np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), values).astype(np.float32)
    )


def attended(q: mx.array, k: mx.array, v: mx.array, *, window: int = 0) -> mx.array:
    return attention(q, k, v, scale=q.shape[2] ** -0.5, offset=k.shape[0] - q.shape[0], window=window)


def check(inputs: Inputs, *, window: int = 0, tolerance: float = 3e-6) -> None:
    got, expected = attended(*inputs, window=window), defined(*inputs, window=window)
    error = mx.abs(got.astype(mx.float32) - expected).max(axis=(1, 2))
    largest = mx.abs(expected).max().item()
    wrong = [t for t, off in enumerate(error.tolist()) if not off <= tolerance * largest]
    assert not wrong, f"{len(wrong)} of {q_rows(inputs)} rows are off, the first is row {wrong[0]}: " + (
        f"{got[wrong[0], 0, :4].tolist()} ..., not {expected[wrong[0], 0, :4].tolist()} ..."
    )


def q_rows(inputs: Inputs) -> int:
    return inputs[0].shape[0]


def with_scores(scores: list[float], D: int = 8) -> Inputs:
    """One query whose scores are those, in powers of e, and values that count: key s has s in all columns."""
    k = mx.zeros((len(scores), 1, D))
    k[:, 0, 0] = mx.array(scores) * D**0.5
    v = mx.broadcast_to(mx.arange(len(scores))[:, None, None].astype(mx.float32), k.shape)
    return mx.ones((1, 1, D)), k, v


def test_two_keys_by_hand() -> None:
    """Weights 1 and 3: (0 + 3 * 1) / 4."""
    assert attended(*with_scores([0.0, np.log(3.0)])).tolist()[0][0] == pytest.approx([0.75] * 8)


@pytest.mark.parametrize("length", [1, 5, 255, 256, 257, 300, 700])
def test_equal_scores_give_the_mean(length: int) -> None:
    """Of 0, 1, ... : every span counts by how many keys it has."""
    got = attended(*with_scores([1.3] * length)).tolist()[0][0]
    assert got == pytest.approx([(length - 1) / 2] * 8, rel=1e-5), "spans do not join as they should"


@pytest.mark.parametrize("at", [0, 255, 256, 300, 511, 512, 599])
def test_one_key_that_is_far_ahead_wins_in_whichever_span(at: int) -> None:
    """Also by so much that the others' weights beside it are nothing at all, and cannot be scaled back."""
    for lead in (30.0, 200.0):
        scores = [-3.0] * 600
        scores[at] += lead
        assert attended(*with_scores(scores)).tolist()[0][0] == pytest.approx([at] * 8, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("level", [-1e4, -300.0, 90.0, 1e4])
def test_scores_of_any_size(level: float) -> None:
    """Only differences of scores count. The halves weigh 1 and 2, whatever the level."""
    scores = [level + (np.log(2.0) if s >= 300 else 0.0) for s in range(600)]
    got = attended(*with_scores(scores)).tolist()[0][0]
    assert got == pytest.approx([(149.5 + 2 * 449.5) / 3] * 8, rel=2e-3 if abs(level) > 1e3 else 1e-4)


def test_spans_of_rising_and_falling_scores() -> None:
    for levels in ((0.3, 2.9, 1.4), (2.9, 0.3, 1.4), (0.3, 1.4, 2.9)):
        check(with_scores([levels[s // 256] + 0.01 * (s % 7) for s in range(700)]), tolerance=2e-5)


@pytest.mark.parametrize(
    ("T", "S", "H", "K", "D"),
    [(1, 300, 2, 1, 8), (3, 270, 14, 2, 64), (40, 600, 4, 2, 20), (2, 530, 2, 2, 128), (300, 300, 1, 1, 8)],
)
def test_as_it_is_defined(T: int, S: int, H: int, K: int, D: int) -> None:
    check(normal(T, S, H, K, D))


@pytest.mark.parametrize(("T", "S", "D"), [(2, 300, 64), (30, 530, 20)])
def test_scales_of_keys_and_values(T: int, S: int, D: int) -> None:
    """16 bits: a learner's kernel gets them with scales, as it would int8's."""
    q, k, v = (x.astype(mx.bfloat16) for x in normal(T, S, 4, 2, D))
    check((q, k, v), tolerance=5e-3)


@pytest.mark.parametrize("window", [1, 3, 40, 255, 256, 257, 400])
def test_a_window(window: int) -> None:
    """Rows whose windows begin, and end, in one span or in several; more rows than a window is long."""
    check(normal(3, 600, 2, 1, 8), window=window)
    check(normal(90, 600, 1, 1, 8, seed=1), window=window)


@pytest.mark.parametrize("T", [4, 40])
@pytest.mark.parametrize("window", [1, 3, 20, 300])
def test_a_row_adds_nothing_that_it_does_not_see(T: int, window: int) -> None:
    """Not even 0 times it: that of a NaN is a NaN. All that sees none is as ever, in each of its columns."""
    q, k, v = normal(T, 410, 1, 1, 8)
    want = attended(q, k, v, window=window)
    place = mx.arange(410)[:, None, None]
    for clean in (1, 3):
        ahead = mx.where(place >= 410 - T + clean, mx.nan, v)
        got = attended(q, k, ahead, window=window)
        assert mx.array_equal(got[:clean], want[:clean]), "a row has added values of keys that come after it"
        assert mx.all(mx.isnan(got[clean:])).item(), "a row has not added its own key's value"
    behind = mx.where(place < 410 - window, mx.nan, v)
    got = attended(q, k, behind, window=window)
    assert mx.array_equal(got[-1:], want[-1:]), "a row has added values of keys that lie before its window"


def test_a_rows_bits_are_its_own() -> None:
    """Alone, or among others: 300 keys of its window, in two or three spans."""
    q, k, v = normal(37, 560, 2, 1, 16)
    whole = attended(q, k, v, window=300)
    for t in (0, 5, 20, 36):
        end = 560 - 37 + t + 1
        alone = attended(q[t : t + 1], k[:end], v[:end], window=300)
        assert mx.array_equal(alone[0], whole[t]), f"row {t} has other bits alone"
