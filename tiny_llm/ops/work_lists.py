"""What the kernels of attention have to do: lists made once a step, for all its layers.

Owns how a batch's rows are cut into pieces for threadgroups of our Metal kernels, and put together for calls
of MLX's. Knows no kernel and no layer: it is told the sizes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, Literal, NamedTuple, cast

import mlx.core as mx

from tiny_llm.data import Pages
from tiny_llm.ops.kv_pool import GATHER_BYTES

FEW_ROWS = 8  # rows of a sequence that MLX's kernel for decoding takes
Places = tuple[mx.array, mx.array] | tuple[slice, slice]
SpanRow = tuple[int, int, int]  # a row, its sequence, and the tokens that it sees
UNBOUNDED = 2**30  # a window that hides nothing
MOST_ROWS = 16  # of a shared span in one piece of work: more are cut into several, as a GPU wants many pieces


@dataclass(frozen=True, slots=True)
class ReadGroup:
    """Rows of one call of attention.

    ``rows`` are R of each of B sequences, B is 1 where the mask is "causal". ``places`` are what they see: a
    range of the pool's tokens, or int32 [B, K, L], the vectors of a pool that is seen as [N * S * K, D].
    ``mask`` [B, H or 1, R, L] is False for what a row may not see.
    """

    rows: slice | mx.array
    places: slice | mx.array
    mask: mx.array | Literal["causal"] | None


class LayerSizes(NamedTuple):
    """``block`` S tokens a block, ``heads`` H, ``kv_heads`` K; bytes of a token's k and v; a row's window."""

    block: int
    heads: int
    kv_heads: int
    token_bytes: int
    window: int = 0


class ReadGroups:
    """The calls of MLX's attention, and how rows of their outputs, one after the other, come back into order.

    Sequences with as many new rows, few, go together in length classes, so that little is padded; a chunk
    goes alone. ``order`` [T] is None where they are in order. Nothing is evaluated here.
    """

    def __init__(self, pages: Pages, sizes: LayerSizes) -> None:
        self._pages, self._sizes = pages, sizes
        starts = cast(list[int], pages.query_start_loc.tolist())
        self._lens = cast(list[int], pages.context_lens.tolist())
        self._starts = starts
        # How much of a sequence no row of this step sees: what comes before the first one's window.
        hidden = [
            n - (end - start) + 1 - sizes.window
            for n, (start, end) in zip(self._lens, pairwise(starts), strict=True)
        ]
        self._firsts = [max(0, tokens) if sizes.window else 0 for tokens in hidden]
        classes: dict[tuple[int, int], list[int]] = {}
        for b, (start, end) in enumerate(pairwise(starts)):
            if count := end - start:
                blocks = -(-self._seen(b) // sizes.block)
                alike = (blocks - 1).bit_length() if count <= FEW_ROWS else -1 - b
                classes.setdefault((count, alike), []).append(b)
        parts = [part for members in classes.values() for part in self._within_bytes(members)]
        self.groups = [self._group(part) for part in parts]
        rows = [row for part in parts for row in self._rows(part)]
        self.order: mx.array | None = None
        if rows != list(range(len(rows))):
            self.order = mx.array(sorted(range(len(rows)), key=rows.__getitem__), mx.int32)

    def _seen(self, b: int) -> int:
        return self._lens[b] - self._firsts[b]

    def _within_bytes(self, members: list[int]) -> list[list[int]]:
        """A class in parts that gather no more than ``GATHER_BYTES``."""
        longest = max(map(self._seen, members))
        most = max(1, GATHER_BYTES // (longest * self._sizes.token_bytes))
        return [members[i : i + most] for i in range(0, len(members), most)]

    def _rows(self, members: list[int]) -> list[int]:
        return [row for b in members for row in range(self._starts[b], self._starts[b + 1])]

    def _group(self, members: list[int]) -> ReadGroup:
        rows = self._rows(members)
        in_a_row = rows == list(range(rows[0], rows[0] + len(rows)))
        at = slice(rows[0], rows[0] + len(rows)) if in_a_row else mx.array(rows, mx.int32)
        each = len(rows) // len(members)
        lens = [self._seen(b) for b in members]
        places = self._alone(members[0]) if len(members) == 1 else self._gathered(members)
        if each == 1 and len(set(lens)) == 1:
            return ReadGroup(at, places, None)
        if len(members) == 1 and not 0 < self._sizes.window < lens[0]:
            return ReadGroup(at, places, "causal")
        return ReadGroup(at, places, self._mask(lens, each))

    def _alone(self, b: int) -> slice | mx.array:
        """A range where the sequence's blocks lie side by side."""
        width, size = self._pages.block_tables.shape[1], self._sizes.block
        first, end = self._firsts[b] // size, -(-self._lens[b] // size)
        tables = memoryview(self._pages.block_tables).cast("B").cast("i")  # type: ignore[arg-type]
        own = tables[b * width + first : b * width + end].tolist()
        if own == list(range(own[0], own[0] + end - first)):
            begin = own[0] * size + self._firsts[b] % size
            return slice(begin, begin + self._seen(b))
        return self._gathered([b])

    def _gathered(self, members: list[int]) -> mx.array:
        """Where the vectors of ``members`` lie, int32 [B, K, L]; behind a shorter one's end any other's."""
        size, heads = self._sizes.block, self._sizes.kv_heads
        tables = self._pages.block_tables
        if len(members) < tables.shape[0]:
            tables = tables[mx.array(members, mx.int32)]
        longest = max(map(self._seen, members))
        firsts = mx.array([[self._firsts[b]] for b in members], mx.int32)
        at = mx.minimum(firsts + mx.arange(longest, dtype=mx.int32), tables.shape[1] * size - 1)
        tokens = mx.take_along_axis(tables, at // size, axis=1) * size + at % size
        return tokens[:, None] * heads + mx.arange(heads, dtype=mx.int32)[:, None]

    def _mask(self, lens: list[int], rows: int) -> mx.array:
        """Of few rows as large as the scores: attention would make it so in each layer."""
        ends = mx.array([[length - rows + 1 + row for row in range(rows)] for length in lens], mx.int32)
        places, ends = mx.arange(max(lens), dtype=mx.int32), ends[:, None, :, None]
        seen = places < ends
        if self._sizes.window:
            seen &= places >= ends - self._sizes.window
        heads = self._sizes.heads if rows <= FEW_ROWS else 1
        return mx.contiguous(mx.broadcast_to(seen, (len(lens), heads, rows, max(lens))))


class SpanPieces(NamedTuple):
    """``total`` ``pieces``, each of five numbers as kernels/metal/paged_attention.metal has them; int32.

    Its first place in ``rows``, how many of these it has, a sequence, the tokens that are seen, and the span.
    There are ``places`` rows in all.
    """

    pieces: mx.array
    rows: mx.array
    total: int
    places: int


class SpanWork(NamedTuple):
    """Spans that several rows ``shared`` are read once for them; behind these each row has its ``own``.

    ``order`` has each row's places in the order of its spans, those in ``own.rows`` numbered behind those in
    ``shared.rows``; ``firsts`` has where each row begins in it, and where the last one ends.
    """

    shared: SpanPieces
    own: SpanPieces
    order: mx.array
    firsts: mx.array


class TileWork(NamedTuple):
    """``total`` ``pieces``, each of five numbers as kernels/metal/paged_attention_tile.metal has them; int32.

    The sequence's first row, how many rows it has, the sequence, the tokens that its first row sees, and
    the first pair.
    """

    pieces: mx.array
    total: int


class WorkLists:
    """The work lists of one step over ``pages``, each made when a layer first asks for it.

    The layers of a model ask for the same list, so it is kept: making it takes a walk over all rows.
    """

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self._by_span: dict[tuple[int, int, int, int], SpanWork] = {}
        self._by_tile: dict[tuple[int, int, int], TileWork] = {}
        self._known: list[tuple[int, int, int, int]] | None = None
        self._by_sizes: dict[LayerSizes, ReadGroups] = {}
        self._places: dict[int, Places] = {}

    def reads(self, sizes: LayerSizes) -> ReadGroups:
        """The calls of MLX's attention."""
        if sizes not in self._by_sizes:
            self._by_sizes[sizes] = ReadGroups(self.pages, sizes)
        return self._by_sizes[sizes]

    def places(self, size: int) -> Places:
        """Each new row's block, and its place in that of ``size`` tokens: int32 [T], or ranges of one."""
        if size not in self._places:
            slots = self.pages.slot_mapping
            if slots.size == 1:  # writing to a range is fewer operations
                block, place = divmod(cast(int, slots.item()), size)
                self._places[size] = slice(block, block + 1), slice(place, place + 1)
            else:
                self._places[size] = slots // size, slots % size
        return self._places[size]

    @property
    def decodes(self) -> int:
        """How many of the first sequences have one new row each; a step has its decodes first."""
        return sum(1 for _ in takewhile(lambda one: one[2] - one[1] == 1, self._sequences()))

    def spans(self, size: int, rows: int, block_size: int, window: int = UNBOUNDED) -> SpanWork:
        """The work of the first ``rows`` rows, cut into spans of ``size`` tokens of their contexts.

        Spans before a row's ``window`` are no work; rows that have left theirs behind share none.
        """
        key = size, rows, block_size, window
        if key not in self._by_span:
            known = [
                (row, sequence, length - (end - row) + 1)
                for sequence, start, end, length in self._sequences()
                for row in range(start, min(end, rows))
            ]
            whole = [row for row in known if row[2] <= window]
            groups = _groups(whole, self.pages.block_tables, size, block_size)
            self._by_span[key] = _spans(known, groups, size, window)
        return self._by_span[key]

    def tiles(self, group: int, pairs: int, first: int = 0) -> TileWork:
        """A piece of work for every ``pairs`` of a row and one of the ``group`` heads that share a key head.

        It is of the sequences from the one whose row is ``first``, and counts rows from there.
        """
        if (group, pairs, first) not in self._by_tile:
            self._by_tile[group, pairs, first] = _tiles(self._sequences(), group, pairs, first)
        return self._by_tile[group, pairs, first]

    def _sequences(self) -> list[tuple[int, int, int, int]]:
        """Of each sequence: its number, its first row and where its rows end, and its context's tokens."""
        if self._known is None:
            starts = cast(list[int], self.pages.query_start_loc.tolist())
            lens = cast(list[int], self.pages.context_lens.tolist())
            self._known = [(b, start, end, lens[b]) for b, (start, end) in enumerate(pairwise(starts))]
        return self._known


def _groups(
    rows: list[SpanRow], tables: mx.array, size: int, block_size: int
) -> Iterator[tuple[int, list[SpanRow]]]:
    """Spans, each with two rows or more that have the same blocks there and before; none is a row's last."""
    blocks, row_bytes = memoryview(cast(Any, tables)).tobytes(), tables.shape[1] * tables.itemsize
    span_bytes = size // block_size * tables.itemsize
    groups, span = [rows], 0
    while groups:
        parted: list[list[SpanRow]] = []
        for group in groups:
            alike: dict[bytes, list[SpanRow]] = {}
            for row, sequence, seen in group:
                if (span + 1) * size < seen:
                    at = sequence * row_bytes + span * span_bytes
                    alike.setdefault(blocks[at : at + span_bytes], []).append((row, sequence, seen))
            parted += [same for same in alike.values() if len(same) > 1]
        yield from ((span, group) for group in parted)
        groups, span = parted, span + 1


def _spans(
    rows: list[SpanRow], groups: Iterable[tuple[int, list[SpanRow]]], size: int, window: int
) -> SpanWork:
    places = {row: array("i") for row, _, _ in rows}
    shared = _together(groups, places)
    own = _alone(rows, places, shared.places, size, window)
    order, firsts = array("i"), array("i", [0])
    for each in places.values():
        order.extend(each)
        firsts.append(len(order))
    return SpanWork(shared, own, _padded(order), _padded(firsts))


def _together(groups: Iterable[tuple[int, list[SpanRow]]], places: dict[int, array[int]]) -> SpanPieces:
    """A piece for each span and its rows, of at most MOST_ROWS; a row's places there go to ``places``."""
    work, members = array("i"), array("i")
    for span, group in groups:
        for begin in range(0, len(group), MOST_ROWS):
            some = group[begin : begin + MOST_ROWS]
            work.extend([len(members), len(some), *some[0][1:], span])
            for row, _, _ in some:
                places[row].append(len(members))
                members.append(row)
    return _pieces(work, members)


def _alone(
    rows: list[SpanRow], places: dict[int, array[int]], behind: int, size: int, window: int
) -> SpanPieces:
    """A piece for each span that is a row's own; its place, plus ``behind``, goes to the row's ``places``."""
    work, members = array("i"), array("i")
    for row, sequence, seen in rows:
        first, spans = len(places[row]) or max(0, seen - window) // size, -(-seen // size)
        numbers = array("i", range(len(members), len(members) + spans - first))
        pieces = array("i", [0, 1, sequence, seen, 0]) * len(numbers)  # a long context has hundreds
        pieces[::5], pieces[4::5] = numbers, array("i", range(first, spans))
        work.extend(pieces)
        members.extend([row] * len(numbers))
        places[row].extend(behind + number for number in numbers)
    return _pieces(work, members)


def _pieces(work: array[int], rows: array[int]) -> SpanPieces:
    return SpanPieces(_padded(work), _padded(rows), len(work) // 5, len(rows))


def _tiles(sequences: list[tuple[int, int, int, int]], group: int, pairs: int, first: int) -> TileWork:
    work = array("i")
    for sequence, start, end, length in sequences:
        if start >= first:
            places = array("i", range(0, (end - start) * group, pairs))
            seen_by_first = length - (end - start) + 1
            pieces = array("i", [start - first, end - start, sequence, seen_by_first, 0]) * len(places)
            pieces[4::5] = places
            work.extend(pieces)
    return TileWork(_padded(work), total=len(work) // 5)


def _padded(numbers: array[int]) -> mx.array:
    """An array of 8 or more: MLX passes fewer in another way, which makes another kernel of the same text."""
    padded = numbers + array("i", [0] * (8 - len(numbers)))
    return mx.array(memoryview(padded))  # type: ignore[arg-type]
