"""What each threadgroup of the Metal attention kernels has to do: lists made once a step, for all its layers.

Owns how a batch's rows are cut into pieces of work. Knows no kernel and no layer: it is told the sizes.
"""

from __future__ import annotations

from array import array
from itertools import pairwise, takewhile
from typing import NamedTuple, cast

import mlx.core as mx

from tiny_llm.data import Pages
from tiny_llm.ops.read_groups import LayerSizes, ReadGroups

Places = tuple[mx.array, mx.array] | tuple[slice, slice]


class SpanWork(NamedTuple):
    """``total`` ``pieces``, each the row, its sequence, the tokens that it sees and a span of them; int32.

    ``firsts`` has each row's first piece, and where the last one's end.
    """

    pieces: mx.array
    firsts: mx.array
    total: int


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
        self._by_span: dict[tuple[int, int], SpanWork] = {}
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

    def spans(self, size: int, rows: int) -> SpanWork:
        """The work of the first ``rows`` rows, cut into spans of ``size`` tokens of their contexts."""
        if (size, rows) not in self._by_span:
            self._by_span[size, rows] = _spans(self._sequences(), size, rows)
        return self._by_span[size, rows]

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


def _spans(sequences: list[tuple[int, int, int, int]], size: int, rows: int) -> SpanWork:
    work, firsts = array("i"), array("i", [0])
    for sequence, start, end, length in sequences:
        for row in range(start, min(end, rows)):
            seen = length - (end - row) + 1
            spans = -(-seen // size)
            pieces = array("i", [row, sequence, seen, 0]) * spans
            pieces[3::4] = array("i", range(spans))
            work.extend(pieces)
            firsts.append(len(work) // 4)
    return SpanWork(_padded(work), _padded(firsts), total=firsts[-1])


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
