"""Attention over pages: keys and values lie in blocks of a pool, found through block tables. Chapter 3.2.

Letters: ``T`` new tokens, ``B`` sequences, ``H`` query heads, ``K`` key/value heads, ``D`` head
dim, ``N`` blocks, ``S`` tokens a block, ``W`` blocks in the longest table.

A pool is keys [N, K, D, S] and values [N, K, S, D]: the S keys of a block lie side by side for
each d, so that a kernel scores all of them at once. (Kwon et al. 2023, PagedAttention.)
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import cast

import mlx.core as mx

from tiny_llm.data import Pages
from tiny_llm.ops.attention import attention_ref
from tiny_llm.ops.backend import active, cpu, on_cpu
from tiny_llm.ops.metal import kernel, on_metal

Pool = tuple[mx.array, mx.array]
_SPAN = 256  # tokens of a context that one threadgroup sees, at most


def empty_pool(shape: tuple[int, int, int], blocks: int, max_blocks: int, dtype: mx.Dtype) -> Pool:
    """A pool of K, D, S = ``shape`` with ``blocks`` blocks, all 0.

    Backend "cpu" maps ``max_blocks`` at once: memory that was never written to costs nothing there.
    """
    heads, dim, size = shape
    if active() == "cpu":
        return (
            cpu.untouched_zeros((max_blocks, heads, dim, size), dtype),
            cpu.untouched_zeros((max_blocks, heads, size, dim), dtype),
        )
    return mx.zeros((blocks, heads, dim, size), dtype), mx.zeros((blocks, heads, size, dim), dtype)


def resize_pool(pool: Pool, blocks: int) -> Pool:
    """The same pool with more blocks."""
    keys, values = pool
    more = blocks - keys.shape[0]
    keys = mx.concatenate([keys, mx.zeros((more, *keys.shape[1:]), keys.dtype)])
    values = mx.concatenate([values, mx.zeros((more, *values.shape[1:]), values.dtype)])
    mx.eval(keys, values)  # a layer at a time, so that only one is in memory twice
    return keys, values


def copy_blocks(source: Pool, target: Pool, pairs: mx.array) -> Pool:
    """``target`` with ``source``'s blocks ``pairs[:, 0]`` in its blocks ``pairs[:, 1]``; perhaps in place.

    On backend "cpu" it is to be evaluated before anything else is told to write ``source``.
    """
    if active() == "cpu":
        return (
            cpu.copy_blocks(source[0], target[0], pairs),
            cpu.copy_blocks(source[1], target[1], pairs),
        )
    for old, new in zip(source, target, strict=True):
        blocks = old[pairs[:, 0]]
        mx.eval(blocks)  # whoever has yet to read a pool keeps it from being written where it lies
        new[pairs[:, 1]] = blocks
        mx.eval(new)
    return target


def paged_attention(
    q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages
) -> tuple[mx.array, mx.array, mx.array]:
    """Write k, v [T, K, D] to ``pages.slot_mapping``, then attend: return out [T, H, D] and the pool.

    Query row t of sequence b stands at position ``context_lens[b] - starts[b + 1] + t`` and sees its
    own sequence up to there. See ``paged_attention_ref``.
    """
    scale = q.shape[-1] ** -0.5
    if on_cpu("paged_attention", q, k, v):
        return cpu.attend(
            q,
            k,
            v,
            pool[0],
            pool[1],
            pages.slot_mapping,
            pages.block_tables,
            pages.query_start_loc,
            pages.context_lens,
            scale,
        )
    rows = pages.slot_mapping.shape[0]
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or not q.shape[0] == k.shape[0] == rows:
        shapes = f"{q.shape}, {k.shape}, {v.shape}, {pages.slot_mapping.shape}"
        raise ValueError(f"[paged_attention] expected q [T, H, D], k, v [T, K, D], slots [T], got {shapes}")
    if on_metal("paged_attention", q, k, v):
        return _metal(q, k, v, pool, pages, scale)
    return paged_attention_ref(q, k, v, pool, pages, scale)


def _write(pool: Pool, k: mx.array, v: mx.array, slots: mx.array) -> Pool:
    """The pool with k, v [T, K, D] at ``slots``, written in place where nobody else holds it.

    A pool that is seen transposed would be copied, here or by the kernel that reads it.
    """
    keys, values = pool
    size = keys.shape[3]
    block, place = slots // size, slots % size
    keys[block, :, :, place] = k.astype(keys.dtype)
    values[block, :, place] = v.astype(values.dtype)
    return keys, values


def _metal(
    q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages, scale: float
) -> tuple[mx.array, mx.array, mx.array]:
    """MLX writes k and v; then by tiles where a sequence has several new rows, if those keep a row's bits."""
    keys, values = _write(pool, k, v, pages.slot_mapping)
    many = q.shape[0] > pages.context_lens.shape[0] and tile_fits(keys.shape[3], q.shape[2])
    attend = _tiles if many and tiles_keep_bits(active()) else _rows
    return attend(q, keys, values, pages, scale), keys, values


def _rows(q: mx.array, keys: mx.array, values: mx.array, pages: Pages, scale: float) -> mx.array:
    """A threadgroup a query row, key/value head and span of the row's context."""
    (T, H, D), (_, K, _, S) = q.shape, keys.shape
    span = _span(S)
    if "work" not in pages.derived:
        pages.derived["work"] = _work(pages, span)
    work, items = pages.derived["work"]
    split, parts = work.shape[0] > T, _parts(H // K, D)
    dtype = mx.float32 if split else q.dtype
    (out,) = kernel("paged_attention")(
        inputs=[q, keys, values, pages.block_tables, work, pages.block_tables.shape[1], scale],
        template=[
            *(("T", q.dtype), ("OUT", dtype), ("D", D), ("S", S), ("K", K), ("G", H // K)),
            *(("PARTS", parts), ("SPAN", span), ("SPLIT", split)),
        ],
        grid=(32 * parts, K, work.shape[0]),
        threadgroup=(32 * parts, 1, 1),
        output_shapes=[(work.shape[0], H, D + 2) if split else q.shape],
        output_dtypes=[dtype],
    )
    if split:
        (out,) = kernel("paged_attention_merge", "paged_attention")(
            inputs=[out, items],
            template=[("T", q.dtype), ("H", H), ("D", D)],
            grid=(32, H, T),
            threadgroup=(32, 4, 1),
            output_shapes=[q.shape],
            output_dtypes=[q.dtype],
        )
    return out


def _tiles(q: mx.array, keys: mx.array, values: mx.array, pages: Pages, scale: float) -> mx.array:
    """A threadgroup a key/value head and tile of pairs of a query row and one of the head's queries."""
    (_, H, D), (_, K, _, S) = q.shape, keys.shape
    parts, tile = _parts(H // K, D), 2 if D <= 128 else 1
    key = f"tiles of {8 * tile} pairs, {H // K} a row"
    if key not in pages.derived:
        pages.derived[key] = (_tile_work(pages, H // K, 8 * tile),)
    (work,) = pages.derived[key]
    (out,) = kernel("paged_attention_tile")(
        inputs=[q, keys, values, pages.block_tables, work, pages.block_tables.shape[1], scale],
        template=[
            *(("T", q.dtype), ("D", D), ("S", S), ("K", K), ("G", H // K)),
            *(("PARTS", parts), ("SPAN", _span(S)), ("M", tile)),
        ],
        grid=(32 * parts, K, work.shape[0]),
        threadgroup=(32 * parts, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )
    return out


def tile_fits(size: int, dim: int) -> bool:
    """Whether tiles can take blocks of ``size`` tokens and heads of ``dim``."""
    return dim % 8 == 0 and dim <= 256 and size % 8 == 0 and (size <= 32 or size % 32 == 0)


@cache
def tiles_keep_bits(backend: str) -> bool:
    """Whether tiles may be used on ``backend``: there are some, and they give a row the bits it has alone.

    Asked of the device, once a process: Apple does not say in which order its matrix instruction sums.
    """
    if backend not in ("metal", "metalsim"):
        return False
    context, new = _SPAN + 43, 3
    table = mx.arange(-(-context // 16), dtype=mx.int32)[None]
    starts, lens = mx.array([0, new], mx.int32), mx.array([context], mx.int32)
    pages = Pages(mx.zeros((new,), mx.int32), table, starts, lens)
    q, keys, values = (
        mx.random.normal(shape, key=mx.random.key(seed))
        for seed, shape in enumerate([(new, 6, 64), (table.size, 2, 64, 16), (table.size, 2, 16, 64)])
    )
    tiles, rows = (attend(q, keys, values, pages, 0.125) for attend in (_tiles, _rows))
    return bool(mx.array_equal(tiles, rows).item())


def _tile_work(pages: Pages, group: int, pairs: int) -> mx.array:
    """What there is to do [N, 5], as kernels/metal/paged_attention_tile.metal has it; ``pairs`` a tile."""
    starts, lens = (
        cast(list[int], pages.query_start_loc.tolist()),
        cast(list[int], pages.context_lens.tolist()),
    )
    work = [
        (start, end - start, b, lens[b] - (end - start) + 1, pair)
        for b, (start, end) in enumerate(pairwise(starts))
        for pair in range(0, (end - start) * group, pairs)
    ]
    return mx.array(work, mx.int32)


def _span(size: int) -> int:
    """Tokens of a span: whole blocks of ``size``."""
    return max(1, _SPAN // size) * size


def _work(pages: Pages, size: int) -> tuple[mx.array, mx.array]:
    """What there is to do: [N, 4] of row, sequence, tokens seen and span; and each row's first item [T + 1].

    A span is ``size`` tokens.
    """
    starts, lens = (
        cast(list[int], pages.query_start_loc.tolist()),
        cast(list[int], pages.context_lens.tolist()),
    )
    work: list[tuple[int, int, int, int]] = []
    items = [0]
    for b, (start, end) in enumerate(pairwise(starts)):
        for row in range(start, end):
            seen = lens[b] - (end - row) + 1
            work += [(row, b, seen, span) for span in range(-(-seen // size))]
            items.append(len(work))
    return mx.array(work, mx.int32), mx.array(items, mx.int32)


def _parts(group: int, dim: int) -> int:
    """Simdgroups that share a sequence: at most 4, and what they hold must fit in 32 KB."""
    return max(1, min(4, (32 * 1024 // 4 - group * dim) // (group * (dim + 2))))


def paged_attention_ref(
    q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages, scale: float
) -> tuple[mx.array, mx.array, mx.array]:
    """The mathematics: gather each sequence's blocks into one array, and attend as ever."""
    keys, values = _write(pool, k, v, pages.slot_mapping)
    size = keys.shape[3]
    starts, lens = (
        cast(list[int], pages.query_start_loc.tolist()),
        cast(list[int], pages.context_lens.tolist()),
    )
    outs = []
    for b, (start, end) in enumerate(pairwise(starts)):
        table = pages.block_tables[b, : -(-lens[b] // size)]
        blocks = keys[table].swapaxes(2, 3), values[table]
        own_k, own_v = (_tokens(read)[: lens[b]].astype(q.dtype) for read in blocks)
        outs.append(attention_ref(q[start:end], own_k, own_v, scale=scale, offset=lens[b] - (end - start)))
    return mx.concatenate(outs), keys, values


def _tokens(blocks: mx.array) -> mx.array:
    """Blocks [W, K, S, D] as the tokens in them [W * S, K, D]."""
    count, heads, size, dim = blocks.shape
    return blocks.swapaxes(1, 2).reshape(count * size, heads, dim)
