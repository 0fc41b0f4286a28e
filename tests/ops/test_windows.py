"""A window over pages: as ``ref`` by each backend, a row's own bits, and no byte read of what no row sees."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

from tiny_llm.data import Pages
from tiny_llm.metalsim.run import watch
from tiny_llm.metrics import fallbacks
from tiny_llm.ops import backend
from tiny_llm.ops import paged_attention as attention
from tiny_llm.ops.kv_pool import KvFormat, Pool, settled
from tiny_llm.ops.paged_attention import kv_write, paged_attention, paged_attention_ref
from tiny_llm.ops.work_lists import WorkLists

Off = Callable[[mx.array, mx.array], float]
S, K, D = 16, 2, 64
TOLERANCE = {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


def normal(*shape: int, seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


class Step:
    """Sequences of ``lens`` tokens, of which the last ``new`` are queries. Block 0 is nobody's, and all NaN.

    What a sequence's window has left behind whole is gone: its table has block 0 there.
    """

    def __init__(self, lens: list[int], new: list[int], window: int, H: int, dtype: mx.Dtype, kept: mx.Dtype):
        first, tables, slots = 1, list[list[int]](), list[int]()
        for length, rows in zip(lens, new, strict=True):
            table = list(range(first, first + -(-length // S)))
            first += len(table)
            slots += [table[p // S] * S + p % S for p in range(length - rows, length)]
            gone = max(0, length - rows + 1 - window) // S
            tables.append([0] * gone + table[gone:])
        width = max(map(len, tables))
        wide = [table + [0] * (width - len(table)) for table in tables]
        starts = [sum(new[:b]) for b in range(len(new) + 1)]
        self.pages = Pages(*(mx.array(x, mx.int32) for x in (slots, wide, starts, lens)))
        self.q, self.k, self.v = (
            normal(sum(new), n, D, seed=i, dtype=dtype) for i, n in enumerate((H, K, K))
        )
        k, v = (normal(first * S, K, D, seed=seed, dtype=dtype) for seed in (3, 4))
        pool = KvFormat(1, K, D, S, kept, token_major=False).empty_pool(first, first)
        with backend.use("ref"):
            pool = kv_write(pool, k, v, mx.arange(first * S, dtype=mx.int32))
        for array in pool:
            if array.dtype != mx.int8:
                array[0] = mx.nan
        self.pool: Pool = pool

    def copy(self) -> Pool:
        return tuple(mx.array(array) for array in self.pool)

    def expected(self, window: int) -> mx.array:
        scale = D**-0.5
        return paged_attention_ref(self.q, self.k, self.v, self.copy(), self.pages, scale, window)[0]

    def alone(self, b: int) -> tuple[slice, Pages]:
        starts = self.pages.query_start_loc
        own = slice(starts[b].item(), starts[b + 1].item())
        rows = mx.array([0, own.stop - own.start], mx.int32)
        tables, lens = self.pages.block_tables[b : b + 1], self.pages.context_lens[b : b + 1]
        return own, Pages(self.pages.slot_mapping[own], tables, rows, lens)


LENS, NEW = [300, 40, 17, 290, 129], [1, 1, 1, 9, 3]


@pytest.mark.parametrize("window", [1, 16, 100, 128, 299, 1000])
@pytest.mark.parametrize("kept", [mx.float32, mx.bfloat16, mx.int8], ids=str)
def test_the_cpu_kernels_see_the_window(window: int, kept: mx.Dtype, off: Off) -> None:
    if not backend.works():
        pytest.skip("the CPU kernels were not built: no C++ compiler")
    step = Step(LENS, NEW, window, 14, mx.float32, kept)
    expected, before = step.expected(window), fallbacks().read()
    with backend.use("cpu"):
        out, _ = paged_attention(step.q, step.k, step.v, step.copy(), step.pages, window=window)
        rounded = kept == mx.bfloat16 and backend.cpu.isa() == "avx512bf16"  # queries and weights too
        assert off(out, expected) < (8e-3 if rounded else 3e-6)
        assert fallbacks().read() == before, "it was left to ref"
        for b in range(len(LENS)):
            own, pages = step.alone(b)
            rows = [x[own] for x in (step.q, step.k, step.v)]
            one, _ = paged_attention(*rows, step.copy(), pages, window=window)
            assert mx.array_equal(one, out[own]).item(), f"sequence {b} alone has other bits"


@pytest.mark.slow
@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("window", [1, 20, 128, 140, 1000])
@pytest.mark.parametrize(
    ("dtype", "int8"), [(mx.float32, False), (mx.bfloat16, False), (mx.float16, True)], ids=str
)
def test_the_metal_kernels_see_the_window(window: int, dtype: mx.Dtype, int8: bool, off: Off) -> None:
    """By rows and by tiles, with the same bits; together and alone."""
    step = Step(LENS, NEW, window, 6, dtype, mx.int8 if int8 else dtype)
    expected = step.expected(window)
    written = settled(kv_write(step.copy(), step.k, step.v, step.pages.slot_mapping))
    tiles, rows = (
        attend(step.q, written, WorkLists(step.pages), D**-0.5, window)[0]
        for attend in (attention._tiles, attention._rows)
    )
    assert off(rows, expected) < TOLERANCE[dtype]
    assert mx.array_equal(tiles, rows).item(), "tiles have other bits"
    whole = paged_attention(step.q, step.k, step.v, step.copy(), step.pages, window=window)[0]
    assert mx.array_equal(whole, rows).item()
    for b in (0, 3):
        own, pages = step.alone(b)
        one = paged_attention(*(x[own] for x in (step.q, step.k, step.v)), step.copy(), pages, window=window)
        assert mx.array_equal(one[0], rows[own]).item(), f"sequence {b} alone has other bits"


@pytest.mark.parametrize("new", [1, 4])
def test_metal_reads_the_window_and_no_more(where: str, new: int) -> None:
    if where != "metalsim":
        pytest.skip("what is read is seen in the simulator alone")
    window, length = 100, 700
    assert attention.attention_tiles_keep_bits(where, scaled=False)
    step = Step([length], [new], window, 4, mx.bfloat16, mx.bfloat16)
    with watch() as seen:
        paged_attention(step.q, step.k, step.v, step.copy(), step.pages, window=window)
    reader = "paged_attention_tile" if new > 1 else "paged_attention"
    traffic = next(traffic for name, traffic in seen if name == reader)
    token = K * D * 2
    read = max(traffic.fetched[name] for name in ("keys", "values"))
    most = (window + new - 1 + 2 * S) * token  # the blocks at both ends
    assert window * token <= read <= most, (
        f"{read // token} tokens of {length} are read, for a window of {window}"
    )
