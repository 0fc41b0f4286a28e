"""Which rows of a step MLX's attention reads keys and values for in one call: made once a step.

Sequences with as many new rows, few, go together in length classes, so that little is padded; a chunk goes
alone. Owns what is read at once. Knows no layer: it is told the sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, cast

import mlx.core as mx

from tiny_llm.data import Pages
from tiny_llm.ops.kv_pool import GATHER_BYTES

FEW_ROWS = 8
"""Rows of a sequence that MLX's kernel for decoding takes."""


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
    """The calls of a step, and how rows of their outputs, one after the other, come back into order.

    ``order`` [T] is None where they are in order. Nothing is evaluated here: the pages are the host's own.
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
