"""Both caches: what attention sees through them."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm.data import Batch, KVCache
from tiny_llm.kv.dense import FIRST_CAPACITY, DenseCache, capacity, written
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.ops.attention import attention
from tiny_llm.ops.backend import use

H, K, D = 4, 2, 8
SCALE = D**-0.5


def rows(length: int, seed: int = 0) -> tuple[mx.array, mx.array, mx.array]:
    keys = mx.random.split(mx.random.key(seed), 3)
    shapes = ((length, H, D), (length, K, D), (length, K, D))
    q, k, v = (mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True))
    return q, k, v


def batch_of(*lengths: int) -> Batch:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    total = mx.arange(starts[-1])
    return Batch(total, total, tuple(starts), total)


def difference(a: mx.array, b: mx.array) -> float:
    return mx.max(mx.abs(a - b)).item()


@pytest.mark.chapter("1.3")
def test_no_cache_attends_over_each_sequence_by_itself() -> None:
    q, k, v = rows(9)
    got = NoCache().attend(0, q, k, v, batch_of(4, 1, 4))
    parts = [slice(0, 4), slice(4, 5), slice(5, 9)]
    alone = [attention(q[p], k[p], v[p], scale=SCALE, offset=0) for p in parts]
    assert mx.array_equal(got, mx.concatenate(alone)), "a row saw keys of another sequence"
    half = NoCache().attend(0, *(one.astype(mx.bfloat16) for one in (q, k, v)), batch_of(4, 1, 4))
    assert half.dtype == mx.bfloat16


@pytest.mark.parametrize("chunks", [(9,), (1,) * 9, (4, 5), (1, 7, 1)])
@pytest.mark.chapter("2.1")
def test_dense_in_chunks_is_attention_over_the_whole(chunks: tuple[int, ...]) -> None:
    q, k, v = rows(9)
    cache, outs, start = DenseCache(1), [], 0
    for size in chunks:
        part = slice(start, start + size)
        outs.append(cache.attend(0, q[part], k[part], v[part], batch_of(size)))
        start += size
        assert cache.length == start
    whole = NoCache().attend(0, q, k, v, batch_of(9))
    assert difference(mx.concatenate(outs), whole) < 1e-5


@pytest.mark.chapter("2.1")
def test_dense_grows_and_forgets_nothing() -> None:
    """600 tokens are more than the first two capacities."""
    q, k, v = rows(600)
    cache = DenseCache(1)
    for start in range(0, 600, 200):
        part = slice(start, start + 200)
        got = cache.attend(0, q[part], k[part], v[part], batch_of(200))
        mx.eval(got)
    assert difference(got, attention(q[400:], k, v, scale=SCALE, offset=400)) < 1e-5


@pytest.mark.chapter("2.1")
def test_layers_do_not_mix() -> None:
    cache = DenseCache(2)
    outs = []
    for step in range(3):
        for layer in range(2):
            outs.append(cache.attend(layer, *rows(1, seed=10 * step + layer), batch_of(1)))
    stack = [[rows(1, seed=10 * step + 1)[i] for step in range(3)] for i in (1, 2)]
    k, v = (mx.concatenate(parts) for parts in stack)
    assert difference(outs[-1], attention(rows(1, seed=21)[0], k, v, scale=SCALE, offset=2)) < 1e-5


@pytest.mark.chapter("2.1")
def test_length_counts_only_tokens_that_every_layer_holds() -> None:
    cache = DenseCache(2)
    cache.attend(0, *rows(3), batch_of(3))
    assert cache.length == 0, "the step has not reached the last layer"
    cache.attend(1, *rows(3), batch_of(3))
    assert cache.length == 3


@pytest.mark.chapter("2.1")
def test_each_layer_has_a_length_of_its_own() -> None:
    """Two pieces through the first layer, then both through the second."""
    q, k, v = rows(5)
    cache, parts = DenseCache(2), (slice(0, 3), slice(3, 5))
    for layer in range(2):
        outs = [cache.attend(layer, q[p], k[p], v[p], batch_of(p.stop - p.start)) for p in parts]
        assert difference(mx.concatenate(outs), attention(q, k, v, scale=SCALE, offset=0)) < 1e-5


@pytest.mark.chapter("2.1")
def test_attention_is_given_the_rows_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(q: mx.array, k: mx.array, v: mx.array, **rest: float) -> mx.array:
        assert q.dtype == k.dtype == v.dtype, "what is kept in halves comes back as q's dtype"
        seen.append((k.shape[0], v.shape[0]))
        return attention(q, k, v, **rest)

    monkeypatch.setattr("tiny_llm.kv.dense.attention", watched)
    cache = DenseCache(1, mx.bfloat16)
    for count in (3, 1):
        cache.attend_arrays(0, *rows(count))
    assert seen == [(3, 3), (4, 4)], "there is room for 256, and the other rows are empty"
    DenseCache(1).attend_arrays(0, *(one.astype(mx.float16) for one in rows(3)))


@pytest.mark.chapter("2.1")
def test_truncating_changes_no_array() -> None:
    cache = DenseCache(2)
    for layer in range(2):
        cache.attend_arrays(layer, *rows(5, seed=layer))
    before = [*cache._keys, *cache._values]
    cache.truncate(2)
    assert cache._lengths == [2, 2], "in every layer"
    assert all(now is then for now, then in zip([*cache._keys, *cache._values], before, strict=True))
    cache.truncate(0)
    assert cache._lengths == [0, 0], "nothing is a number of tokens, too"
    assert all(now is then for now, then in zip([*cache._keys, *cache._values], before, strict=True))
    with pytest.raises(AssertionError):
        cache.truncate(3)
    with pytest.raises(AssertionError):
        cache.truncate(-1)


@pytest.mark.chapter("2.1")
def test_truncated_tokens_are_as_if_they_had_never_been() -> None:
    q, k, v = rows(6)
    cache = DenseCache(1)
    cache.attend(0, q[:3], k[:3], v[:3], batch_of(3))
    cache.attend(0, *rows(5, seed=1), batch_of(5))
    cache.truncate(3)
    assert cache.length == 3
    got = cache.attend(0, q[3:], k[3:], v[3:], batch_of(3))
    assert difference(got, attention(q[3:], k, v, scale=SCALE, offset=3)) < 1e-5


@pytest.mark.chapter("2.1")
def test_truncate_mends_a_step_that_failed_between_layers() -> None:
    q, k, v = rows(4)
    cache = DenseCache(2)
    for layer in range(2):
        cache.attend(layer, q[:2], k[:2], v[:2], batch_of(2))
    cache.attend(0, *rows(1, seed=5), batch_of(1))
    cache.truncate(cache.length)
    got = cache.attend(0, q[2:], k[2:], v[2:], batch_of(2))
    assert difference(got, attention(q[2:], k, v, scale=SCALE, offset=2)) < 1e-5


@pytest.mark.chapter("1.3")
def test_no_cache_passes_the_window_on() -> None:
    q, k, v = rows(9)
    got = NoCache().attend(0, q, k, v, batch_of(4, 5), window=2)
    parts = [slice(0, 4), slice(4, 9)]
    alone = [attention(q[p], k[p], v[p], scale=SCALE, offset=0, window=2) for p in parts]
    assert difference(got, mx.concatenate(alone)) < 1e-5


@pytest.mark.chapter("2.1")
@pytest.mark.parametrize("chunks", [(9,), (1,) * 9, (4, 5), (1, 7, 1)])
def test_dense_in_chunks_with_a_window(chunks: tuple[int, ...]) -> None:
    q, k, v = rows(9)
    cache, outs, start = DenseCache(1), [], 0
    for size in chunks:
        part = slice(start, start + size)
        outs.append(cache.attend(0, q[part], k[part], v[part], batch_of(size), window=4))
        start += size
    whole = NoCache().attend(0, q, k, v, batch_of(9), window=4)
    assert difference(mx.concatenate(outs), whole) < 1e-5
    assert difference(NoCache().attend(0, q, k, v, batch_of(9)), whole) > 0.1


@pytest.mark.chapter("2.1")
def test_our_own_mistakes_are_caught() -> None:
    with pytest.raises(AssertionError, match="holds one sequence, got 2"):
        DenseCache(1).attend(0, *rows(2), batch_of(1, 1))
    with pytest.raises(AssertionError):
        DenseCache(1).truncate(1)


def test_both_satisfy_the_protocol() -> None:
    caches: list[KVCache] = [NoCache(), DenseCache(1)]
    outs = [cache.attend(0, *rows(2), batch_of(2)) for cache in caches]
    assert [out.shape for out in outs] == [(2, H, D)] * 2


@pytest.mark.chapter("2.1")
def test_room_doubles() -> None:
    assert [capacity(n) for n in (1, 256, 257, 512, 513, 5000)] == [256, 256, 512, 512, 1024, 8192]
    assert FIRST_CAPACITY == 256


@pytest.mark.chapter("2.1")
def test_written_rows_stand_where_they_should() -> None:
    first = written(None, mx.ones((2, 1, 3)), 0, 2)
    assert first.shape == (256, 1, 3), "the first array has room for 256 tokens"
    second = written(first, mx.full((3, 1, 3), 2.0), 2, 5)
    assert second.shape == (256, 1, 3) and second[:6, 0, 0].tolist() == [1, 1, 2, 2, 2, 0]
    again = written(second, mx.full((1, 1, 3), 3.0), 1, 2)
    assert again[:6, 0, 0].tolist() == [1, 3, 2, 2, 2, 0], "rows after the new ones stay"
    grown = written(again, mx.full((255, 1, 3), 4.0, dtype=again.dtype), 5, 260)
    assert grown.shape[0] == 512 and grown[:6, 0, 0].tolist() == [1, 3, 2, 2, 2, 4], "what was held is lost"
    assert written(None, mx.ones((2, 1, 3), dtype=mx.bfloat16), 0, 2).dtype == mx.bfloat16
    long = written(None, mx.ones((600, 1, 3)), 0, 600)
    assert long.shape[0] == 1024 and long[:601, 0, 0].sum().item() == 600, "room for all of a long prompt"
    full = written(None, mx.ones((256, 1, 3)), 0, 256)
    assert written(full, mx.full((1, 1, 3), 2.0), 256, 257)[255:258, 0, 0].tolist() == [1, 2, 0]
    assert written(mx.ones((512, 1, 3)), mx.ones((1, 1, 3)), 512, 513).shape[0] == 1024


@pytest.mark.chapter("2.1")
def test_what_nobody_else_holds_is_not_copied() -> None:
    held, new = [mx.zeros((8192, 16, 16))], mx.ones((1, 16, 16))
    mx.eval(held, new)
    size = held[0].nbytes
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    held.append(written(held.pop(), new, 5, 6))
    mx.eval(held)
    assert mx.get_peak_memory() - before < size // 2, "a token must not cost a copy of all before it"


@pytest.mark.chapter("2.1")
def test_old_tokens_are_not_computed_with_in_half_precision() -> None:
    """Kept in bfloat16, they come back in the dtype of the queries."""
    q, k, v = rows(4)
    kept = [a.astype(mx.bfloat16).astype(mx.float32) for a in (k, v)]
    with use("ref"):  # a kernel may round the queries too
        got = DenseCache(1, mx.bfloat16).attend(0, q, k, v, batch_of(4))
        assert got.dtype == mx.float32 and difference(got, attention(q, *kept, scale=SCALE, offset=0)) < 1e-5
