"""Attention over pages: keys and values lie in blocks of a pool, found through block tables. Chapter 3.2.

Letters: ``T`` new tokens, ``B`` sequences, ``H`` query heads, ``K`` key/value heads, ``D`` head
dim, ``N`` blocks, ``S`` tokens a block, ``W`` blocks in the longest table.

A pool is keys [N, K, D, S] and values [N, K, S, D], of int8 with scales [N, K, S] of each, or for MLX's
attention both [N, S, K, D], as ``kv_pool.KvFormat`` has them.
(Kwon et al. 2023, PagedAttention.)
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import cast

import mlx.core as mx

from tiny_llm.data import Pages
from tiny_llm.metrics import fallbacks
from tiny_llm.ops.attention import windowed_ref
from tiny_llm.ops.backend import active, cpu, on_cpu, runs_ours
from tiny_llm.ops.kv_pool import KvFormat, Pool, is_token_major, parted, settled
from tiny_llm.ops.metal import kernel, on_metal, scalar
from tiny_llm.ops.rope import rope_ref
from tiny_llm.ops.work_lists import UNBOUNDED, LayerSizes, ReadGroup, SpanPieces, WorkLists

_FLOATS = 32 * 1024 // 4  # that a threadgroup's memory holds
_SUMS = 48  # floats of results that a thread holds for rows that share a span, beyond those of one row
_SPAN = 128  # tokens of a context that one threadgroup sees, at most


def paged_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    pool: Pool,
    pages: Pages,
    work: WorkLists | None = None,
    *,
    window: int = 0,
) -> tuple[mx.array, Pool]:
    """Write k, v [T, K, D] to ``pages.slot_mapping``, then attend: return out [T, H, D] and the pool.

    Query row t of sequence b stands at position ``context_lens[b] - query_start_loc[b + 1] + t`` and sees
    its own sequence up to there, the last ``window`` tokens of it; 0: all. Blocks that no row sees are not
    read. ``work`` is of these pages, and the same in all layers of a step; None: made here. See
    ``paged_attention_ref``.
    """
    scale = q.shape[-1] ** -0.5
    if on_cpu("paged_attention", q, k, v):
        out, written = cpu.attend(q, k, v, list(pool), *pages, scale, window)
        return out, tuple(written)
    rows = pages.slot_mapping.shape[0]
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or not q.shape[0] == k.shape[0] == rows:
        shapes = f"{q.shape}, {k.shape}, {v.shape}, {pages.slot_mapping.shape}"
        raise ValueError(f"[paged_attention] expected q [T, H, D], k, v [T, K, D], slots [T], got {shapes}")
    if on_metal("paged_attention", q, k, v) and _fits(q.shape[1] // k.shape[1], q.shape[2]):
        return _metal(q, k, v, pool, work or WorkLists(pages), scale, window or UNBOUNDED)
    if is_token_major() and pool[0].dtype != mx.int8:
        return paged_attention_mlx(q, k, v, pool, work or WorkLists(pages), scale, window)
    return paged_attention_ref(q, k, v, pool, pages, scale, window)


def kv_write(pool: Pool, k: mx.array, v: mx.array, slots: mx.array) -> Pool:
    """The pool with k, v [T, K, D] at ``slots``."""
    return (_write_in_place if runs_ours("kv_write") else kv_write_ref)(pool, k, v, slots)


def kv_write_ref(pool: Pool, k: mx.array, v: mx.array, slots: mx.array) -> Pool:
    """The pool with k, v [T, K, D] at ``slots``, written in place where nobody else holds it.

    A pool that is seen transposed would be copied, here or by the kernel that reads it.
    """
    keys, values, *scales = settled(pool)
    size = keys.shape[3]
    block, place = slots // size, slots % size
    if scales:
        (k, scales[0][block, :, place]), (v, scales[1][block, :, place]) = quantized(k), quantized(v)
    keys[block, :, :, place] = k.astype(keys.dtype)
    values[block, :, place] = v.astype(values.dtype)
    return keys, values, *scales


def quantized(x: mx.array) -> tuple[mx.array, mx.array]:
    """Vectors [T, K, D] as int8 and float16 scales [T, K]: a vector's largest entry becomes 127."""
    wide = x.astype(mx.float32)
    scales = (mx.max(mx.abs(wide), axis=-1) / 127).astype(mx.float16)
    unit = scales.astype(mx.float32)[..., None]
    steps = mx.where(unit > 0, mx.round(wide / unit), 0)
    return mx.clip(steps, -127, 127).astype(mx.int8), scales


def moved_blocks(pool: Pool, format: KvFormat, slots: mx.array, turns: mx.array, inv_freq: mx.array) -> Pool:
    """The rows at ``slots`` [m * S] as m blocks, keys turned by ``turns`` [m * S] positions: arrays alone.

    A key that was rotated to its position and is rotated again is one of the position that is their sum.
    """
    keys, values, *scales = settled(pool)
    block, place = slots // format.block_size, slots % format.block_size
    shape = (-1, format.block_size, format.heads, format.head_dim)
    if format.token_major:
        k, v = keys[block, place], values[block, place]
        return rope_ref(k, turns, inv_freq).reshape(shape), v.reshape(shape)
    k, v = keys[block, :, :, place], values[block, :, place]
    if not scales:
        k = rope_ref(k, turns, inv_freq)
        return _as_keys(k.reshape(shape)), v.reshape(shape).swapaxes(1, 2)
    k_unit, v_unit = (one[block, :, place].astype(mx.float32)[..., None] for one in scales)
    (k, k_scales), (v, v_scales) = quantized(rope_ref(k * k_unit, turns, inv_freq)), quantized(v * v_unit)
    of_tokens = [one.reshape(shape[:3]).swapaxes(1, 2) for one in (k_scales, v_scales)]
    return _as_keys(k.reshape(shape)), v.reshape(shape).swapaxes(1, 2), *of_tokens


def _as_keys(k: mx.array) -> mx.array:
    """Blocks [m, S, K, D] as a pool's keys [m, K, D, S]."""
    return k.transpose(0, 2, 3, 1)


def _write_in_place(pool: Pool, k: mx.array, v: mx.array, slots: mx.array) -> Pool:
    """The same by a kernel that writes the pool where it lies, whoever holds it: in order by data alone.

    It waits for what the pool's last reader gave; the next is to take what comes back as the third.
    """
    arrays, last = parted(pool)
    (T, K, D), S = k.shape, arrays[0].shape[3]
    scaled = arrays[2:]  # then a simdgroup takes a vector: its largest entry is asked for first
    (written,) = kernel("kv_write_int8" if scaled else "kv_write", "kv_write")(
        inputs=[*arrays, k, v, slots, *(last or [scalar(0)])],
        template=[("P", arrays[0].dtype), ("D", D), ("S", S), ("K", K)],
        grid=(32 if scaled else D, K, T),
        threadgroup=(32 if scaled else min(D, 256), 1, 1),
        output_shapes=[()],
        output_dtypes=[mx.int32],
    )
    return *arrays, written


def paged_attention_mlx(
    q: mx.array, k: mx.array, v: mx.array, pool: Pool, work: WorkLists, scale: float, window: int = 0
) -> tuple[mx.array, Pool]:
    """By MLX's attention, over pools [N, S, K, D]: a call for each of ``WorkLists.reads``."""
    keys, values = pool
    at = work.places(keys.shape[1])
    keys[at] = k.astype(keys.dtype)
    values[at] = v.astype(values.dtype)
    size, kv_heads, dim = keys.shape[1:]
    reads = work.reads(
        LayerSizes(size, q.shape[1], kv_heads, kv_heads * dim * (keys.itemsize + values.itemsize), window)
    )
    outs = [_attend_group(q, keys, values, group, scale) for group in reads.groups]
    out = outs[0] if len(outs) == 1 else mx.concatenate(outs)
    out = out.astype(q.dtype)
    return out if reads.order is None else out[reads.order], (keys, values)


def _attend_group(q: mx.array, keys: mx.array, values: mx.array, group: ReadGroup, scale: float) -> mx.array:
    """Attention of the group's rows, as [rows, H, D]."""
    _, H, D = q.shape
    own = q[group.rows]
    sequences = 1 if isinstance(group.places, slice) else group.places.shape[0]
    each = own.shape[0] // sequences
    # One row each is moved by no transposition, which would be an operation more.
    queries = own[:, :, None] if each == 1 else own.reshape(sequences, each, H, D).swapaxes(1, 2)
    seen = [_vectors(pool, group.places) for pool in (keys, values)]
    out = mx.fast.scaled_dot_product_attention(queries, *seen, scale=scale, mask=group.mask)
    return (out if each == 1 else out.swapaxes(1, 2)).reshape(-1, H, D)


def _vectors(pool: mx.array, places: slice | mx.array) -> mx.array:
    """What lies at ``places`` of a pool [N, S, K, D], as [B, K, L, D]; a range is not copied."""
    _, _, K, D = pool.shape
    if isinstance(places, slice):
        tokens, token = places.stop - places.start, K * D
        return mx.as_strided(pool, (1, K, tokens, D), (pool.size, D, token, 1), places.start * token)
    return mx.take(pool.reshape(-1, D), places, axis=0)


def _metal(
    q: mx.array, k: mx.array, v: mx.array, pool: Pool, work: WorkLists, scale: float, window: int
) -> tuple[mx.array, Pool]:
    """Write k and v; then the rows of decodes go by spans, those of chunks by tiles, if that keeps bits."""
    pool = kv_write(pool, k, v, work.pages.slot_mapping)
    decodes, rows = work.decodes, q.shape[0]
    by_tiles = tile_fits(pool[0].shape[3], q.shape[2]) and decodes < rows
    if not (by_tiles and attention_tiles_keep_bits(active(), scaled=pool[0].dtype == mx.int8)):
        decodes = rows
    outs = []
    if decodes:
        out, read = _rows(q[:decodes] if decodes < rows else q, pool, work, scale, window)
        outs.append(out)
        pool = _after(pool, read)
    if decodes < rows:
        out, read = _tiles(q[decodes:] if decodes else q, pool, work, scale, window, decodes)
        outs.append(out)
        pool = _after(pool, read)
    return outs[0] if len(outs) == 1 else mx.concatenate(outs), pool


def _after(pool: Pool, read: mx.array) -> Pool:
    """The pool for who comes after that reader, where it is written as it lies."""
    arrays, last = parted(pool)
    return (*arrays, read) if last else pool


def _rows(
    q: mx.array, pool: Pool, work: WorkLists, scale: float, window: int = UNBOUNDED
) -> tuple[mx.array, mx.array]:
    """A threadgroup a key/value head, span, and row or rows that share it. And that it was read."""
    (T, H, D), S = q.shape, pool[0].shape[3]
    spans = work.spans(_span(S), T, S, window)
    # Where a row has several spans, its parts are float32 and a second kernel merges them.
    split = spans.shared.places + spans.own.places > T
    out, read = _some_rows(q, pool, work, spans.own, scale, window, split)
    if not split:
        return out, read
    shared = out
    if spans.shared.total:
        shared, _ = _some_rows(q, pool, work, spans.shared, scale, window, split)
    merged, read = kernel("paged_attention_merge", "paged_attention")(
        inputs=[shared, out, scalar(spans.shared.places), spans.order, spans.firsts, read],
        template=[("T", q.dtype), ("H", H), ("D", D)],
        grid=(32, H, T),
        threadgroup=(32, 4, 1),
        output_shapes=[q.shape, ()],
        output_dtypes=[q.dtype, mx.int32],
    )
    return merged, read


def _some_rows(
    q: mx.array, pool: Pool, work: WorkLists, spans: SpanPieces, scale: float, window: int, split: bool
) -> tuple[mx.array, mx.array]:
    """What each place of ``spans`` gets."""
    (_, H, D), (_, K, _, S) = q.shape, pool[0].shape
    G = H // K
    parts = _parts(G, D)
    each, sides = _side_by_side(G, D) if spans.places > spans.total else (1, 1)
    dtype = mx.float32 if split else q.dtype
    out, read = kernel("paged_attention")(
        inputs=_inputs(q, pool, work, [spans.rows, spans.pieces], scale, window),
        template=[
            *(("T", q.dtype), ("P", pool[0].dtype), ("OUT", dtype), ("D", D), ("S", S), ("K", K), ("G", G)),
            *(("R", each), ("SIDES", sides), ("PARTS", parts), ("SPAN", _span(S)), ("SPLIT", split)),
        ],
        grid=(32 * parts * sides, K, spans.total),
        threadgroup=(32 * parts * sides, 1, 1),
        output_shapes=[(spans.places, H, D + 2) if split else q.shape, ()],
        output_dtypes=[dtype, mx.int32],
    )
    return out, read


def _side_by_side(group: int, dim: int) -> tuple[int, int]:
    """Rows of a shared span that a simdgroup takes at a time, and how many simdgroups do so for each part.

    Sums are held in registers, and vectors in a threadgroup's memory.
    """
    each = max(1, min(4, _SUMS // (group * -(-dim // 32))))
    vectors = each * group * (dim + 2 * _parts(group, dim))
    return each, 2 if 2 * vectors <= _FLOATS else 1


def _tiles(
    q: mx.array, pool: Pool, work: WorkLists, scale: float, window: int = UNBOUNDED, first: int = 0
) -> tuple[mx.array, mx.array]:
    """A threadgroup a key/value head and tile of pairs of a query row and one of the head's queries.

    q's rows are those of the step from its row ``first`` on.
    """
    (_, H, D), (_, K, _, S) = q.shape, pool[0].shape
    G = H // K
    parts = _parts(G, D)
    tile = 2 if D <= 128 else 1  # matrices of 8 pairs; what two of them hold at a larger D does not fit
    pieces, count = work.tiles(G, 8 * tile, first)
    out, read = kernel("paged_attention_tile")(
        inputs=_inputs(q, pool, work, [pieces], scale, window),
        template=[
            *(("T", q.dtype), ("P", pool[0].dtype), ("D", D), ("S", S), ("K", K), ("G", G)),
            *(("PARTS", parts), ("SPAN", _span(S)), ("M", tile)),
        ],
        grid=(32 * parts, K, count),
        threadgroup=(32 * parts, 1, 1),
        output_shapes=[q.shape, ()],
        output_dtypes=[q.dtype, mx.int32],
    )
    return out, read


def _inputs(
    q: mx.array, pool: Pool, work: WorkLists, pieces: list[mx.array], scale: float, window: int
) -> list[mx.array]:
    tables = work.pages.block_tables
    arrays, written = parted(pool)
    scales = arrays[2:] or arrays  # of floats nobody reads them
    numbers = scalar(tables.shape[1]), scalar(scale), scalar(window)
    return [q, *arrays[:2], *scales, tables, *pieces, *numbers, *(written or [scalar(0)])]


def tile_fits(size: int, dim: int) -> bool:
    """Whether tiles can take blocks of ``size`` tokens and heads of ``dim``."""
    return dim % 8 == 0 and dim <= 256 and size % 8 == 0 and (size <= 32 or size % 32 == 0)


@cache
def attention_tiles_keep_bits(backend: str, *, scaled: bool) -> bool:
    """Whether attention may go by tiles on ``backend``: it has some, and a row keeps the bits it has alone.

    Asked of the device, once a process: Apple does not say in which order its matrix instruction sums.
    ``scaled``: of pages of int8.
    """
    if backend not in ("metal", "metalsim"):
        return False
    context, new = _SPAN + 43, 3
    table = mx.arange(-(-context // 16), dtype=mx.int32)[None]
    starts, lens = mx.array([0, new], mx.int32), mx.array([context], mx.int32)
    work = WorkLists(Pages(mx.zeros((new,), mx.int32), table, starts, lens))
    q = mx.random.normal((new, 6, 64), key=mx.random.key(0))
    keys = mx.random.normal((table.size, 2, 64, 16), key=mx.random.key(1))
    values = mx.random.normal((table.size, 2, 16, 64), key=mx.random.key(2))
    pool: Pool = (keys, values)
    if scaled:
        scales = mx.abs(keys[:, :, 0]).astype(mx.float16) / 16
        pool = (*((16 * array).astype(mx.int8) for array in pool), scales, scales)
    tiles, rows = (attend(q, pool, work, 0.125)[0] for attend in (_tiles, _rows))
    return bool(mx.array_equal(tiles, rows).item())


def _span(size: int) -> int:
    """Tokens of a span: whole blocks of ``size``."""
    return max(1, _SPAN // size) * size


def _parts(group: int, dim: int) -> int:
    """Simdgroups that share a sequence: at most 4, and what they hold must fit in a threadgroup."""
    queries, result = group * dim, group * (dim + 2)  # a result has its largest score and sum with it
    return max(1, min(4, (_FLOATS - queries) // result))


def _fits(group: int, dim: int) -> bool:
    """Whether a threadgroup has the memory for such heads; where it has not is counted as a fallback."""
    if group * dim + group * (dim + 2) <= _FLOATS:
        return True
    fallbacks().add("paged_attention")
    return False


def paged_attention_ref(
    q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages, scale: float, window: int = 0
) -> tuple[mx.array, Pool]:
    """The mathematics: gather each sequence's blocks that are seen into one array, and attend as ever.

    New keys and values are written first, and read back as they are kept: of int8, what was rounded is the
    same for a row whether it came with others or alone.
    """
    pool = kv_write_ref(pool, k, v, pages.slot_mapping)
    size = pool[0].shape[3]
    starts = cast(list[int], pages.query_start_loc.tolist())
    lens = cast(list[int], pages.context_lens.tolist())
    outs = []
    for b, (start, end) in enumerate(pairwise(starts)):
        length, offset = lens[b], lens[b] - (end - start)
        unseen = max(0, offset + 1 - window) // size if window else 0  # blocks
        table = pages.block_tables[b, unseen : -(-length // size)]
        length, offset = length - unseen * size, offset - unseen * size
        own = (one[:length].astype(q.dtype) for one in blocks_read(pool, table))
        outs.append(windowed_ref(q[start:end], *own, scale=scale, offset=offset, window=window))
    return mx.concatenate(outs), pool


def blocks_read(pool: Pool, table: mx.array) -> tuple[mx.array, mx.array]:
    """The keys and values [W * S, K, D] in the blocks ``table`` [W]; int8 times scales is float32."""
    keys, values, *scales = pool
    k, v = _tokens(keys[table].swapaxes(2, 3)), _tokens(values[table])
    if scales:
        k_unit, v_unit = (_tokens(one[table][..., None]).astype(mx.float32) for one in scales)
        k, v = k * k_unit, v * v_unit
    return k, v


def _tokens(blocks: mx.array) -> mx.array:
    """Blocks [W, K, S, D] as the tokens in them [W * S, K, D]."""
    count, heads, size, dim = blocks.shape
    return blocks.swapaxes(1, 2).reshape(count * size, heads, dim)
