"""What each threadgroup of the Metal attention kernels has to do: lists made once a step, for all its layers.

Owns how a batch's rows are cut into pieces of work. Knows no kernel and no layer: it is told the sizes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import mlx.core as mx

from tiny_llm.data import Pages
from tiny_llm.ops.read_groups import LayerSizes, ReadGroups

Places = tuple[mx.array, mx.array] | tuple[slice, slice]


class WorkLists:
    """The work lists of one step over ``pages``, each made when a layer first asks for it.

    The layers of a model ask for the same list, so it is kept: making it takes a walk over all rows.
    """

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self._by_span: dict[int, tuple[mx.array, mx.array]] = {}
        self._by_tile: dict[tuple[int, int], mx.array] = {}
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

    def spans(self, size: int) -> tuple[mx.array, mx.array]:
        """A piece of work for each row and span of ``size`` tokens of its context.

        [N, 4] of row, sequence, tokens seen and span; and each row's first piece [T + 1].
        """
        if size not in self._by_span:
            self._by_span[size] = _spans(self.pages, size)
        return self._by_span[size]

    def tiles(self, group: int, pairs: int) -> mx.array:
        """A piece of work for every ``pairs`` of a row and one of the ``group`` heads that share a key head.

        [N, 5] as kernels/metal/paged_attention_tile.metal has it: the sequence's first row, how many rows it
        has, the sequence, the tokens that its first row sees, and the first pair.
        """
        if (group, pairs) not in self._by_tile:
            self._by_tile[group, pairs] = _tiles(self.pages, group, pairs)
        return self._by_tile[group, pairs]


def _spans(pages: Pages, size: int) -> tuple[mx.array, mx.array]:
    work: list[tuple[int, int, int, int]] = []
    firsts = [0]
    for sequence, start, end, length in _sequences(pages):
        for row in range(start, end):
            seen = length - (end - row) + 1
            spans = -(-seen // size)
            work += [(row, sequence, seen, span) for span in range(spans)]
            firsts.append(len(work))
    return mx.array(work, mx.int32), mx.array(firsts, mx.int32)


def _tiles(pages: Pages, group: int, pairs: int) -> mx.array:
    work: list[tuple[int, int, int, int, int]] = []
    for sequence, start, end, length in _sequences(pages):
        rows = end - start
        seen_by_first = length - rows + 1
        work += [(start, rows, sequence, seen_by_first, pair) for pair in range(0, rows * group, pairs)]
    return mx.array(work, mx.int32)


def _sequences(pages: Pages) -> list[tuple[int, int, int, int]]:
    """Of each sequence: its number, its first row and where its rows end, and the tokens of its context."""
    starts = cast(list[int], pages.query_start_loc.tolist())
    lens = cast(list[int], pages.context_lens.tolist())
    return [(b, start, end, lens[b]) for b, (start, end) in enumerate(pairwise(starts))]
