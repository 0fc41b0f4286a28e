"""Attention on the CPU kernels: a row's bits are its own, pools change in place, wrong numbers do no harm."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import pytest

from tests.instruction_sets import SETS
from tiny_llm.ops import backend
from tiny_llm.ops.attention import attention, attention_ref
from tiny_llm.ops.backend import cpu

pytestmark = pytest.mark.skipif(not backend.works(), reason="the CPU kernels are not built")


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that the machine has; afterwards the settings are as before."""
    before, threads = cpu.isa(), cpu.num_threads()
    if SETS.index(request.param) > SETS.index(cpu.best_isa()):
        pytest.skip(f"this machine has no {request.param}")
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)
    cpu.set_num_threads(threads)


@dataclass(frozen=True)
class Text:
    """One sequence's rows: q [S, H, D], k and v [S, K, D]."""

    q: mx.array
    k: mx.array
    v: mx.array


def text(length: int, heads: int = 14, kv_heads: int = 2, dim: int = 64, seed: int = 0) -> Text:
    keys = mx.random.split(mx.random.key(seed), 3)
    counts = (heads, kv_heads, kv_heads)
    return Text(*(mx.random.normal((length, n, dim), key=key) for n, key in zip(counts, keys, strict=True)))


class Pages:
    """A pool, and the texts whose blocks lie in it in an order drawn from ``seed``."""

    def __init__(self, texts: Sequence[Text], size: int = 16, dtype: mx.Dtype = mx.float32, seed: int = 0):
        kv_heads, dim = texts[0].k.shape[1:]
        counts = [-(-t.q.shape[0] // size) for t in texts]
        order = random.Random(seed).sample(range(sum(counts)), sum(counts))
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        self.texts, self.size = texts, size
        self.tables = [order[end - n : end] for n, end in zip(counts, ends, strict=True)]
        self.done = [0] * len(texts)
        blank = mx.full((len(order), kv_heads, dim, size), mx.nan, dtype)  # unwritten: not to be read
        self.keys, self.values = blank, mx.contiguous(blank.swapaxes(2, 3))

    def step(self, news: dict[int, int], **wrong: mx.array) -> mx.array:
        """Take in the next ``news[b]`` rows of each text b, in the order given; return their attention."""
        size, rows = self.size, {b: range(self.done[b], self.done[b] + n) for b, n in news.items()}
        for b, n in news.items():
            self.done[b] += n
        width = max(len(self.tables[b]) for b in news)
        numbers = {
            "slots": [self.tables[b][p // size] * size + p % size for b in news for p in rows[b]],
            "block_tables": [(self.tables[b] + [-1] * width)[:width] for b in news],
            "starts": [sum(list(news.values())[:i]) for i in range(len(news) + 1)],
            "context_lens": [self.done[b] for b in news],
        }
        q, k, v = (
            mx.concatenate([getattr(self.texts[b], name)[rows[b].start : rows[b].stop] for b in news])
            for name in "qkv"
        )
        integers = {name: mx.array(values, mx.int32) for name, values in numbers.items()} | wrong
        scale = q.shape[-1] ** -0.5
        out, (self.keys, self.values) = cpu.attend(q, k, v, [self.keys, self.values], **integers, scale=scale)
        return out


def same(a: mx.array, b: mx.array) -> bool:
    """Whether two float32 arrays have the same bits."""
    return bool(mx.array_equal(a.view(mx.uint32), b.view(mx.uint32)).item())


def reference(t: Text, dtype: mx.Dtype = mx.float32) -> mx.array:
    k, v = (x.astype(dtype).astype(mx.float32) for x in (t.k, t.v))
    return attention_ref(t.q, k, v, scale=t.q.shape[-1] ** -0.5, offset=0)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(14, 2, 64), (3, 3, 8), (6, 1, 20), (4, 2, 128), (2, 1, 7)]
)
def test_as_ref_has_it(
    isa: str, off: Callable[[mx.array, mx.array], float], heads: int, kv_heads: int, dim: int, dtype: mx.Dtype
) -> None:
    t = text(300, heads, kv_heads, dim)
    pages = Pages([t], dtype=dtype, seed=1)
    got = mx.concatenate([pages.step({0: n}) for n in (270, 1, 29)])
    rounded = (isa, dtype) == ("avx512bf16", mx.bfloat16)  # queries and weights too: tests/test_attention.cpp
    assert off(got, reference(t, dtype)) < (8e-3 if rounded else 5e-6)
    if dtype == mx.float32:
        with backend.use("cpu"):
            assert same(attention(t.q[270:], t.k, t.v, scale=dim**-0.5, offset=270), got[270:])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_rows_bits_are_its_own(isa: str, dtype: mx.Dtype) -> None:
    """In chunks of any size, in any company, from any blocks in any order, on any number of threads."""
    mine, others = text(530), [text(290, seed=1), text(17, seed=2)]
    cpu.set_num_threads(1)
    whole = Pages([mine], dtype=dtype).step({0: 530})
    ways: list[tuple[int, int, list[dict[int, int]]]] = [  # threads, block size, steps
        (2, 16, [{0: 530}]),
        (2, 32, [{0: 1}, {0: 255}, {0: 257}, {0: 16}, {0: 1}]),
        (3, 64, [{1: 280, 0: 500}, *([{1: 1, 0: 1, 2: 1}] * 10), {0: 20}]),
        (8, 16, [{0: 505, 2: 17}, *([{1: 50, 0: 5}] * 5)]),
    ]
    for threads, size, steps in ways:
        cpu.set_num_threads(threads)
        pages, got = Pages([mine, *others], size, dtype, seed=threads), []
        for news in steps:
            begins = dict(zip(news, [sum(list(news.values())[:i]) for i in range(len(news))], strict=True))
            got.append(pages.step(news)[begins[0] : begins[0] + news[0]])
        assert same(mx.concatenate(got), whole), f"{threads} threads, blocks of {size}, {steps[:2]} ..."


def test_no_row_sees_what_comes_after_it(isa: str) -> None:
    """Not even a NaN, which no weight of 0 could hide."""
    t = text(40, heads=3, kv_heads=3, dim=16)
    want = Pages([t]).step({0: 40})
    spoilt = Text(t.q, *(mx.where(mx.arange(40)[:, None, None] < 21, x, mx.nan) for x in (t.k, t.v)))
    got = Pages([spoilt]).step({0: 40})
    assert same(got[:21], want[:21])
    assert mx.all(mx.isnan(got[21:])).item()


WRONG = {
    "a context shorter than its rows": {"context_lens": [8, 4]},
    "a context that is negative": {"context_lens": [8, -9]},
    "a context beyond the table": {"context_lens": [8, 2**31 - 1]},
    "a block that is none": {"block_tables": [[0], [-1]]},
    "a block beyond the pool": {"block_tables": [[0], [2]]},
    "starts that fall": {"starts": [0, 14, 13]},
    "starts beyond the rows": {"starts": [0, 8, 2**31 - 1]},
    "a slot beyond the pool": {"slots": [*range(8), 16, 17, 18, 19, 32]},
    "a slot below it": {"slots": [*range(8), 16, 17, 18, 19, -(2**31)]},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_numbers_become_nan_and_a_line(isa: str, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    texts = [text(8), text(5, seed=1)]
    right = Pages(texts)
    right.tables = [[0], [1]]
    want = right.step({0: 8, 1: 5})
    pages = Pages(texts)
    pages.tables = [[0], [1]]
    got = pages.step({0: 8, 1: 5}, **{key: mx.array(value, mx.int32) for key, value in WRONG[name].items()})
    assert mx.all(mx.isnan(got[8:])).item(), "the result looks right"
    if {"context_lens", "block_tables"} & WRONG[name].keys():
        assert same(got[:8], want[:8]), "the other sequence is not as ever"
    assert capfd.readouterr().err.startswith("[attend] "), "nobody is told"


def test_a_slot_of_minus_one_is_not_written() -> None:
    t = text(4)
    pages = Pages([t])
    mx.eval(pages.step({0: 3}))
    before = pages.keys + 0
    mx.eval(before)
    mx.eval(pages.step({0: 1}, slots=mx.array([-1], mx.int32)))
    assert mx.array_equal(pages.keys, before, equal_nan=True)


def run_steps(pages: Pages, steps: int, ahead: int) -> int:
    """Peak bytes beyond the start's over ``steps`` single rows, built ``ahead`` of those that are done."""
    waiting: list[mx.array] = []
    mx.eval(pages.keys, pages.values)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(steps):
        waiting.append(pages.step({0: 1}))
        mx.async_eval(waiting[-1]) if ahead else mx.eval(waiting[-1])
        if len(waiting) > ahead:
            mx.eval(waiting.pop(0))
    mx.eval(waiting)
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("ahead", [0, 1, 50])
def test_a_thousand_steps_take_no_more_memory(ahead: int) -> None:
    """The pool is written where it lies, also when later steps are built before earlier ones are done."""
    t = text(1000, heads=2, kv_heads=2, dim=64)
    mx.eval(t.q, t.k, t.v)
    pages = Pages([t], size=64)
    pool = pages.keys.nbytes
    most = run_steps(pages, 1000, ahead)
    assert most < pool, f"the pool of {pool} bytes was copied: {most} bytes at the peak"


def test_steps_built_at_once_are_done_in_order(isa: str) -> None:
    """A graph of many steps, evaluated from its end."""
    t = text(60)
    whole, pages = Pages([t]).step({0: 60}), Pages([t])
    outs = [pages.step({0: n}) for n in (30, 1, 1, 28)]
    mx.eval(outs[-1])
    begins = [0, 30, 31, 32, 60]
    for (begin, end), out in zip(pairwise(begins), outs, strict=True):
        assert same(out, whole[begin:end])


def test_a_pool_is_changed_where_it_lies() -> None:
    """So a pool has one owner: whoever holds the array from before sees the new rows in it."""
    t = text(16, heads=2, kv_heads=2, dim=8)
    pages = Pages([t])
    old = pages.values
    mx.eval(pages.step({0: 16}))
    assert mx.array_equal(old[0, 0], t.v[:, 0])


def test_rows_kept_without_a_query() -> None:
    """No row of q, some of k and v: the write alone."""
    t = text(16, heads=2, kv_heads=2, dim=8)
    out, (keys, _) = cpu.attend(
        t.q[:0],
        t.k,
        t.v,
        [mx.zeros((1, 2, 8, 16)), mx.zeros((1, 2, 16, 8))],
        mx.arange(16, dtype=mx.int32),
        mx.zeros((1, 1), mx.int32),
        mx.zeros((2,), mx.int32),
        mx.array([16], mx.int32),
        1.0,
    )
    assert out.shape == (0, 2, 8)
    assert mx.array_equal(keys[0, 1], t.k[:, 1].T)
