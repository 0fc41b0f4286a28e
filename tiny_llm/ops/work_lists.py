"""What each threadgroup of the Metal attention kernels has to do: lists made once a step, for all its layers.

Owns how a batch's rows are cut into pieces of work. Knows no kernel and no layer: it is told the sizes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import pairwise, takewhile
from typing import Any, NamedTuple, cast

import mlx.core as mx

from tiny_llm.data import Pages
from tiny_llm.ops.read_groups import LayerSizes, ReadGroups

Places = tuple[mx.array, mx.array] | tuple[slice, slice]
SpanRow = tuple[int, int, int]
"""A row, its sequence, and the tokens that it sees."""
UNBOUNDED = 2**30
"""A window that hides nothing."""
MOST_ROWS = 16
"""Of a shared span in one piece of work: more are cut into several, as a GPU wants many pieces."""


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
