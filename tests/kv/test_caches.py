"""Both caches: what attention sees through them."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm.data import Batch, KVCache
from tiny_llm.kv.dense import DenseCache
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.ops.attention import attention

pytestmark = pytest.mark.chapter("1.3")
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


def test_no_cache_attends_over_each_sequence_by_itself() -> None:
    q, k, v = rows(9)
    got = NoCache().attend(0, q, k, v, batch_of(4, 1, 4))
    parts = [slice(0, 4), slice(4, 5), slice(5, 9)]
    alone = [attention(q[p], k[p], v[p], scale=SCALE, offset=0) for p in parts]
    assert mx.array_equal(got, mx.concatenate(alone)), "a row saw keys of another sequence"


@pytest.mark.parametrize("chunks", [(9,), (1,) * 9, (4, 5), (1, 7, 1)])
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


def test_dense_grows_and_forgets_nothing() -> None:
    """600 tokens are more than the first two capacities."""
    q, k, v = rows(600)
    cache = DenseCache(1)
    for start in range(0, 600, 200):
        part = slice(start, start + 200)
        got = cache.attend(0, q[part], k[part], v[part], batch_of(200))
        mx.eval(got)
    assert difference(got, attention(q[400:], k, v, scale=SCALE, offset=400)) < 1e-5


def test_layers_do_not_mix() -> None:
    cache = DenseCache(2)
    outs = []
    for step in range(3):
        for layer in range(2):
            outs.append(cache.attend(layer, *rows(1, seed=10 * step + layer), batch_of(1)))
    stack = [[rows(1, seed=10 * step + 1)[i] for step in range(3)] for i in (1, 2)]
    k, v = (mx.concatenate(parts) for parts in stack)
    assert difference(outs[-1], attention(rows(1, seed=21)[0], k, v, scale=SCALE, offset=2)) < 1e-5


def test_length_counts_only_tokens_that_every_layer_holds() -> None:
    cache = DenseCache(2)
    cache.attend(0, *rows(3), batch_of(3))
    assert cache.length == 0, "the step has not reached the last layer"
    cache.attend(1, *rows(3), batch_of(3))
    assert cache.length == 3


def test_truncated_tokens_are_as_if_they_had_never_been() -> None:
    q, k, v = rows(6)
    cache = DenseCache(1)
    cache.attend(0, q[:3], k[:3], v[:3], batch_of(3))
    cache.attend(0, *rows(5, seed=1), batch_of(5))
    cache.truncate(3)
    assert cache.length == 3
    got = cache.attend(0, q[3:], k[3:], v[3:], batch_of(3))
    assert difference(got, attention(q[3:], k, v, scale=SCALE, offset=3)) < 1e-5


def test_truncate_mends_a_step_that_failed_between_layers() -> None:
    q, k, v = rows(4)
    cache = DenseCache(2)
    for layer in range(2):
        cache.attend(layer, q[:2], k[:2], v[:2], batch_of(2))
    cache.attend(0, *rows(1, seed=5), batch_of(1))
    cache.truncate(cache.length)
    got = cache.attend(0, q[2:], k[2:], v[2:], batch_of(2))
    assert difference(got, attention(q[2:], k, v, scale=SCALE, offset=2)) < 1e-5


def test_our_own_mistakes_are_caught() -> None:
    with pytest.raises(AssertionError, match="holds one sequence, got 2"):
        DenseCache(1).attend(0, *rows(2), batch_of(1, 1))
    with pytest.raises(AssertionError, match="cannot truncate 0 tokens to 1"):
        DenseCache(1).truncate(1)


def test_both_satisfy_the_protocol() -> None:
    caches: list[KVCache] = [NoCache(), DenseCache(1)]
    outs = [cache.attend(0, *rows(2), batch_of(2)) for cache in caches]
    assert [out.shape for out in outs] == [(2, H, D)] * 2
