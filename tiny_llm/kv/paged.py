"""Owns the pages: for each layer a pool of keys and one of values, cut into blocks. Chapter 3.1.

Which block is whose is the BlockManager's to say; here its plans are carried out: blocks are
copied, moved to host memory and back, new rows are written in place, and attention reads
them through block tables. Knows no sequence, no token and no request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from tiny_llm.data import Batch, Join, Plan
from tiny_llm.ops.kv_pool import KvFormat, Pool, copy_blocks, cut_pool, num_blocks, resize_pool, settled
from tiny_llm.ops.paged_attention import moved_blocks, paged_attention
from tiny_llm.ops.work_lists import WorkLists

_TRIED = 64  # blocks


class PagedCache:
    """Keys and values of many sequences, in blocks. Satisfies ``data.KVCache``.

    ``max_blocks`` is what the pool may grow to, ``host_blocks`` what those who are swapped out may take
    beside it.
    """

    def __init__(self, format: KvFormat, *, max_blocks: int, host_blocks: int = 0) -> None:
        self.format = format
        self.max_blocks = max_blocks
        self.host_blocks = host_blocks
        self._layers: list[Pool] = []
        self._blocks = 0  # that the plans have of them
        self._host: list[Pool] = []
        self._saved: list[tuple[list[bytes], list[mx.array]]] = []
        self._work: WorkLists | None = None  # of the step under way, the same for all layers

    def swap_ms(self) -> float:
        """Milliseconds that a block takes to host memory and back, measured on blocks of one layer."""
        pools = [self.format.empty_pool(_TRIED, _TRIED) for _ in range(2)]
        pairs = mx.array([(i, i) for i in range(_TRIED)], mx.int32)
        taken = []
        for _ in range(3):  # the first touches memory that nobody has touched
            began = time.perf_counter()
            for source, target in (pools, reversed(pools)):
                mx.eval(copy_blocks(source, target, pairs))
            taken.append(time.perf_counter() - began)
        return 1e3 * min(taken) * self.format.num_layers / _TRIED

    def arrays(self) -> list[mx.array]:
        """All keys and values, to be waited for."""
        return [array for pool in self._layers for array in pool]

    def put(self, arrays: Sequence[mx.array]) -> None:
        """Take the place of ``arrays``: what a step that has written them gave."""
        each = len(self.format.arrays)
        self._layers = [tuple(arrays[i : i + each]) for i in range(0, len(arrays), each)]

    def clear(self) -> None:
        """Let go of all arrays, after a step that failed half way."""
        self._layers, self._host, self._saved, self._blocks = [], [], [], 0

    def prepare(self, plan: Plan) -> None:
        """Grow to the plan's blocks, then swap out, copy and swap in as it says, and shrink to its blocks.

        The moves are done, or under way ahead of all that follows, when this returns: the next to write
        the pool writes it where it lies, and waits for nobody who only means to read it.
        """
        if plan.num_blocks > self._blocks:
            self._layers = self._sized(self._layers, plan.num_blocks, self.max_blocks)
        if plan.swap_out:
            most, room = 1 + max(slot for _, slot in plan.swap_out), _blocks(self._host)
            if most > room:  # at least doubled, so that growing is rare
                room = min(max(most, 2 * room), self.host_blocks)
            self._host = self._sized(self._host, room, self.host_blocks)
            _move(self._layers, self._host, plan.swap_out)
        if plan.copies:
            _move(self._layers, self._layers, plan.copies)
        if plan.swap_in:
            _move(self._host, self._layers, plan.swap_in)
        if not plan.num_blocks:
            self.clear()
        elif plan.num_blocks < self._blocks:
            self._shrink(plan.num_blocks)
        self._blocks = plan.num_blocks

    def save(self, leaving: Sequence[tuple[int, bytes]]) -> None:
        """Take what these blocks hold, before another is told to write them, for ``saved``."""
        if leaving:
            flat = self._bytes_of([block for block, _ in leaving])
            mx.async_eval(flat)  # type: ignore[no-untyped-call]  # MLX's stubs lack its types
            self._saved.append(([held for _, held in leaving], flat))

    def saved(self) -> Iterator[tuple[bytes, bytes]]:
        """The contents that were saved since last asked, each with its keys and values of all layers."""
        saved, self._saved = self._saved, []
        for contents, arrays in saved:
            views = [memoryview(array) for array in arrays]  # type: ignore[arg-type]  # as numpy has it
            sizes = [len(view) // len(contents) for view in views]
            for i, held in enumerate(contents):
                parts = zip(views, sizes, strict=True)
                yield held, b"".join([view[i * size : (i + 1) * size] for view, size in parts])

    def load(self, coming: Sequence[tuple[bytes, int]]) -> None:
        """Write keys and values, as ``saved`` gave them, to their blocks; the pool has all of these."""
        if coming:
            together = b"".join([data for data, _ in coming])
            rows = mx.array(together).reshape(len(coming), -1)  # type: ignore[arg-type]  # as above
            pools = self._pools_of(lambda start, end: rows[:, start:end])
            _move(pools, self._layers, [(i, block) for i, (_, block) in enumerate(coming)])

    def give(self, blocks: Sequence[int]) -> list[memoryview]:
        """What these blocks hold: of one array of the pool after the other, all of them."""
        flat = self._bytes_of(blocks)
        mx.eval(flat)
        return [memoryview(array) for array in flat]  # type: ignore[arg-type]  # as above

    def take(self, data: mx.array, count: int, pairs: Sequence[tuple[int, int]]) -> None:
        """Write what ``give`` gave of ``count`` blocks, uint8 [n]: (which of them, block)."""
        _move(self._pools_of(lambda start, end: data[count * start : count * end]), self._layers, pairs)

    def join(self, joins: Sequence[Join], inv_freq: Sequence[mx.array]) -> None:
        """Move rows as the joins say; each layer's keys are turned by its ``inv_freq`` [D / 2]."""
        for blocks, *rows in joins:
            slots, turns = (mx.array(memoryview(one)) for one in rows)  # type: ignore[arg-type]  # as above
            for layer, pool in enumerate(self._layers):
                moved = moved_blocks(pool, self.format, slots, turns, inv_freq[layer])
                pairs = mx.array(list(enumerate(blocks)), mx.int32)
                self._layers[layer] = copy_blocks(moved, pool, pairs)
                mx.eval(*self._layers[layer])  # a layer at a time, so that only one is in memory twice

    def _bytes_of(self, blocks: Sequence[int]) -> list[mx.array]:
        """What blocks hold: uint8, one for each array of each layer."""
        rows = mx.array(list(blocks), mx.int32)
        return [array[rows].view(mx.uint8).reshape(-1) for pool in self._layers for array in settled(pool)]

    def _pools_of(self, part: Callable[[int, int], mx.array]) -> list[Pool]:
        """Each layer's arrays of blocks that lie as bytes; ``part`` has bytes start:end of all of these."""
        pools, end = list[Pool](), 0
        for _ in range(self.format.num_layers):
            arrays = []
            for array in self.format.arrays:
                start, end = end, end + array.block_bytes
                arrays.append(part(start, end).view(array.dtype).reshape(-1, *array.shape))
            pools.append(tuple(arrays))
        return pools

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, batch: Batch, *, window: int = 0
    ) -> mx.array:
        """Write k, v [T, K, D] to their slots; return q's attention [T, H, D] over its sequence so far."""
        assert batch.pages is not None, "a paged cache needs the batch's pages"
        if self._work is None or self._work.pages is not batch.pages:
            self._work = WorkLists(batch.pages)
        pool = self._layers[layer]
        out, self._layers[layer] = paged_attention(q, k, v, pool, batch.pages, self._work, window=window)
        return out

    def _shrink(self, blocks: int) -> None:
        """Let the rest go. Where no part of an array can, copy what stays, a layer at a time."""
        mx.eval(self.arrays(), self._host, [flat for _, flat in self._saved])  # who reads what goes is done
        kept = mx.array([(block, block) for block in range(blocks)], mx.int32)
        for layer, pool in enumerate(self._layers):
            if cut_pool(pool, blocks):
                continue
            smaller = self.format.empty_pool(blocks, self.max_blocks)
            self._layers[layer] = copy_blocks(pool, smaller, kept)
            mx.eval(*self._layers[layer])

    def _sized(self, pools: list[Pool], blocks: int, most: int) -> list[Pool]:
        if not pools:
            return [self.format.empty_pool(blocks, most) for _ in range(self.format.num_layers)]
        if _blocks(pools) >= blocks:
            return pools
        for layer, pool in enumerate(pools):  # each is let go before the next one grows
            pools[layer] = resize_pool(pool, blocks)
        return pools


def _blocks(pools: list[Pool]) -> int:
    return num_blocks(pools[0]) if pools else 0


def _move(source: list[Pool], target: list[Pool], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy blocks (from, to) in each layer; no pair reads what an earlier one has written."""
    assert max(old for old, _ in pairs) < _blocks(source), "a block that is not there is moved"
    assert max(new for _, new in pairs) < _blocks(target), "a block is moved to where none is"
    moved = mx.array(list(pairs), mx.int32)
    for layer, old in enumerate(source):
        target[layer] = copy_blocks(old, target[layer], moved)
    mx.async_eval([list(pool) for pool in target])  # type: ignore[no-untyped-call]  # MLX's stubs lack its types
