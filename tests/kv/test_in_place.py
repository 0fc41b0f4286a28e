"""New keys and values go into the pool where it lies: by the memory that a step takes, and by its graph."""

from __future__ import annotations

import io
import re
from pathlib import Path

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


def test_a_pool_that_grows_or_shrinks_is_in_memory_twice_for_a_layer_only(where: str) -> None:
    """It was there twice as a whole while it grew."""
    layers = 8
    with backend.use(where):
        before, last = mx.get_active_memory(), 0
        pages = PagedCache(KvFormat(layers, K, D, S, mx.float32), max_blocks=BLOCKS)
        for blocks, copies in ((BLOCKS // 2, []), (BLOCKS, []), (BLOCKS // 4, [(BLOCKS - 1, 5)])):
            mx.reset_peak_memory()
            pages.prepare(Plan([], blocks, [], copies, []))
            mx.eval(step(pages, 0, layers=layers))
            mx.synchronize()
            now, most = mx.get_active_memory() - before, mx.get_peak_memory() - before
            held, copied = (2 * layers * POOL * count / BLOCKS for count in (blocks, max(blocks, last)))
            assert abs(now - held) < POOL / 4, f"{blocks} blocks take {now} bytes; it is {held}"
            assert most < copied + 3 * POOL, f"{most} bytes on the way to {blocks} blocks; it was {last}"
            last = blocks


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


def test_our_kernel_writes_a_pool_that_somebody_else_holds() -> None:
    """As a GPU does until its commands are done: with steps ahead, each would have a pool of its own."""
    if reason := why_not():
        pytest.skip(reason)
    with backend.use("metalsim"):
        pages = cache()
        mx.eval(step(pages, 0))
        held = [[mx.stop_gradient(array) for array in pool] for pool in pages._layers]
        mx.eval(held)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(step(pages, 1))
        assert mx.get_peak_memory() - before < POOL / 4
        for (keys, values, _), (old_keys, old_values, _) in zip(pages._layers, held, strict=True):
            assert mx.array_equal(keys, old_keys).item() and mx.array_equal(values, old_values).item()
            assert mx.abs(keys[0, :, :, 1]).max().item() > 0, "and what is written is seen by all"


def waits_for(result: mx.array) -> tuple[dict[str, set[str]], set[str]]:
    """Of each kernel in the graph of ``result``, the kernels that it waits for; and the other operations."""
    graph = io.StringIO()
    mx.export_to_dot(graph, result)
    label = dict(re.findall(r'(\d+) \[label ?="(\w+)"', graph.getvalue()))
    kernels = {node for node, name in label.items() if name == "CustomKernel"}
    made = {array: node for node, array in re.findall(r'(\d+) -> "(\w+)"', graph.getvalue())}
    waits: dict[str, set[str]] = {kernel: set() for kernel in kernels}
    for array, node in re.findall(r'"(\w+)" -> (\d+)', graph.getvalue()):
        if node in kernels and made.get(array) in kernels:
            waits[node].add(made[array])
    return waits, set(label.values())


def test_a_write_waits_for_the_read_before_it_and_a_read_for_its_write(tmp_path: Path) -> None:
    """What MLX has to do for three steps, by its own graph: it makes one of Metal kernels anywhere."""
    found: list[tuple[dict[str, set[str]], set[str]]] = []

    def three_steps(_: mx.array) -> mx.array:
        # There is no device, and none is needed: nothing is run.
        tokens = backend._ACTIVE.set("metal"), backend._OURS.set(None)
        try:
            pages = PagedCache(KvFormat(1, K, D, S, mx.float32), max_blocks=BLOCKS)
            pages.prepare(Plan([], BLOCKS, [], [], []))
            mx.eval(pages._layers)
            out = [step(pages, number, layers=1)[0] for number in range(3)][-1]
        finally:
            backend._ACTIVE.reset(tokens[0])
            backend._OURS.reset(tokens[1])
        found.append(waits_for(out))
        return out

    mx.export_function(str(tmp_path / "steps"), three_steps, mx.zeros(1))
    ((waits, operations),) = found
    assert not operations & {"Scatter", "Copy", "Contiguous", "Transpose"}, "the pool is taken as it is"
    order, left = [], dict(waits)
    while left:
        (first,) = [kernel for kernel, before in left.items() if before <= set(order)]
        order.append(first)
        del left[first]
    assert len(order) == 6, "each write and each read of three steps, in one order and no other"


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


@pytest.mark.parametrize("name", ["ref", "cpu"])
def test_what_leaves_a_pool_that_shrinks_is_what_lay_there(name: str) -> None:
    """Its memory goes where it lies: not before who saves it, or swaps it out, has read it."""
    if name == "cpu" and not backend.works():
        pytest.skip("the CPU kernels were not built: no C++ compiler")
    with backend.use(name):
        pages = cache()
        size = pages.format.block_bytes
        held = {block: bytes([1 + block % 250]) * size for block in (0, 7, 300, BLOCKS - 2, BLOCKS - 1)}
        for _ in range(5):
            pages.load([(data, block) for block, data in held.items()])
            pages.save([(BLOCKS - 1, b"last")])
            pages.prepare(Plan([], 8, [(BLOCKS - 2, 3)], [(300, 5)], []))
            assert dict(pages.saved()) == {b"last": held[BLOCKS - 1]}
            found = [b"".join(map(bytes, pages.give([block]))) for block in (0, 5, 7)]
            assert found == [held[0], held[300], held[7]]
            pages.prepare(Plan([], BLOCKS, [], [], [(3, BLOCKS - 2)]))
            back, gone = (b"".join(map(bytes, pages.give([block]))) for block in (BLOCKS - 2, 300))
            assert back == held[BLOCKS - 2] and not any(gone)
