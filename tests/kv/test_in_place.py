"""New keys and values go into the pool where it lies: by the memory that a step takes, and by its graph."""

from __future__ import annotations

import io
import re

import mlx.core as mx
import pytest

from tiny_llm.data import Batch, Pages, Plan
from tiny_llm.kv.paged import PagedCache
from tiny_llm.metalsim.build import why_not
from tiny_llm.ops import backend
from tiny_llm.ops.kv_pool import KvFormat

LAYERS, K, D, S, BLOCKS, T = 2, 2, 64, 16, 512, 3
POOL = 4 * BLOCKS * K * D * S  # bytes of one layer's keys, and of its values


@pytest.fixture(params=["ref", "mlx", "metalsim"])
def where(request: pytest.FixtureRequest) -> str:
    if request.param == "metalsim" and (reason := why_not()):
        pytest.skip(reason)
    return str(request.param)


def step(cache: PagedCache, number: int, *, layers: int = LAYERS, T: int = T) -> list[mx.array]:
    """A token more for each of T sequences; what attention gives, not yet evaluated."""
    at = mx.array([i * 5 * S + number for i in range(T)], mx.int32)
    lens, starts = mx.full((T,), number + 1, mx.int32), mx.arange(T + 1, dtype=mx.int32)
    pages = Pages(at, (at // S)[:, None], starts, lens)
    batch = Batch(at, at, tuple(range(T + 1)), at, pages)
    q, k, v = (mx.random.normal((T, K, D), key=mx.random.key(number * 3 + i)) for i in range(3))
    mx.eval(q, k, v, at, pages.block_tables, starts, lens)
    return [cache.attend(layer, q, k, v, batch) for layer in range(layers)]


def cache() -> PagedCache:
    made = PagedCache(KvFormat(LAYERS, K, D, S, mx.float32), max_blocks=BLOCKS, host_blocks=8)
    made.prepare(Plan([], BLOCKS, [], [], []))
    return made


@pytest.mark.parametrize("rows", [1, T])
def test_a_step_takes_no_second_pool(where: str, rows: int) -> None:
    with backend.use(where):
        pages = cache()
        mx.eval(step(pages, 0, T=rows))  # the pool's memory comes with the first
        for number in range(1, 21 if where == "mlx" else 6):
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(step(pages, number, T=rows))
            more = mx.get_peak_memory() - before
            assert more < POOL / 4, f"step {number} took {more} bytes more; the keys are {POOL}"


@pytest.mark.parametrize("waits", [True, False], ids=["each step waited for", "a step ahead"])
def test_moves_take_no_second_pool(where: str, waits: bool) -> None:
    """A copy to the host that nobody has evaluated held the pool, so that the step wrote another one."""
    with backend.use(where):
        pages = cache()
        mx.eval(step(pages, 0))
        for number in range(1, 8):
            mx.synchronize()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            one = [(20 * number, number % 8)]
            pages.prepare(Plan([], BLOCKS, one, [(11, 12 * number + 200)], [(number % 8, 10)]))
            outs = step(pages, number)
            mx.eval(outs) if waits else mx.async_eval(outs)
            mx.synchronize()
            more = mx.get_peak_memory() - before
            assert more < POOL / 4, f"step {number} took {more} bytes more; the keys are {POOL}"


def test_this_sees_a_pool_that_somebody_else_holds() -> None:
    with backend.use("ref"):
        pages = cache()
        mx.eval(step(pages, 0))
        held = [mx.array(array) for pool in pages._layers for array in pool]
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(step(pages, 1))
        assert mx.get_peak_memory() - before >= POOL * len(held), "each of the four is copied"


def test_a_kernel_is_given_the_pool_as_it_was_written() -> None:
    """A pool seen transposed would be made contiguous, that is copied, before each kernel."""
    with backend.use("ref"):
        pages = cache()
        mx.eval(step(pages, 0))
        step(pages, 1, layers=1)
    for array in pages._layers[0]:
        graph = io.StringIO()
        mx.export_to_dot(graph, array)
        nodes = re.findall(r'label ?= ?"([A-Z][A-Za-z]+)"', graph.getvalue())
        assert nodes.count("Scatter") == 1
        moved = {"Transpose", "Copy", "Contiguous", "Concatenate"} & set(nodes)
        assert not moved, f"the pool goes through {moved}"
