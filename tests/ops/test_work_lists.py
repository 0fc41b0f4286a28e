"""The Metal attention kernels' work lists: every row's work, once, and one list for all layers of a step."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm.data import Batch, Pages, Plan
from tiny_llm.kv import paged
from tiny_llm.kv.paged import PagedCache
from tiny_llm.ops.kv_pool import KvFormat
from tiny_llm.ops.work_lists import WorkLists


def pages_of(lens: list[int], new: list[int]) -> Pages:
    """Sequences of ``lens`` tokens, the last ``new`` of each in this step; where they lie does not matter."""
    starts = [sum(new[:b]) for b in range(len(new) + 1)]
    return Pages(*(mx.array(x, mx.int32) for x in ([0] * starts[-1], [[0]] * len(lens), starts, lens)))


def rows_of(pieces: mx.array, count: int, width: int) -> object:
    return pieces[: count * width].reshape(count, width).tolist()


def test_spans_cover_what_each_row_sees() -> None:
    pieces, firsts, count = WorkLists(pages_of([9, 3], [2, 1])).spans(4, 3)
    rows = [[0, 0, 8, 0], [0, 0, 8, 1], [1, 0, 9, 0], [1, 0, 9, 1], [1, 0, 9, 2], [2, 1, 3, 0]]
    assert rows_of(pieces, count, 4) == rows, "row, sequence, tokens seen, span"
    assert firsts[:4].tolist() == [0, 2, 5, 6]


def test_tiles_cover_each_pair_of_a_row_and_a_head() -> None:
    pieces, count = WorkLists(pages_of([9, 3], [3, 1])).tiles(3, 8)
    assert rows_of(pieces, count, 5) == [[0, 3, 0, 7, 0], [0, 3, 0, 7, 8], [3, 1, 1, 3, 0]]


def test_rows_of_decodes_and_of_chunks_make_two_lists() -> None:
    lists = WorkLists(pages_of([5, 3, 9, 4], [1, 1, 3, 1]))
    assert lists.decodes == 2, "one that comes after a chunk is not counted"
    spans = lists.spans(4, 2)
    assert rows_of(spans.pieces, spans.total, 4) == [[0, 0, 5, 0], [0, 0, 5, 1], [1, 1, 3, 0]]
    tiles = lists.tiles(2, 8, 2)
    assert rows_of(tiles.pieces, tiles.total, 5) == [[0, 3, 2, 7, 0], [3, 1, 3, 4, 0]], (
        "rows from the third on"
    )


def test_a_short_list_is_no_other_kernel_than_a_long_one() -> None:
    """MLX passes inputs of fewer than 8 elements as constants: the same text is compiled once more."""
    lists = WorkLists(pages_of([1], [1]))
    spans = lists.spans(4, 1)
    assert min(spans.pieces.size, spans.firsts.size, lists.tiles(1, 8).pieces.size) == 8


def test_a_list_is_made_once() -> None:
    lists = WorkLists(pages_of([9], [2]))
    assert lists.spans(4, 2) is lists.spans(4, 2)
    assert lists.tiles(3, 8) is lists.tiles(3, 8)
    assert lists.spans(8, 2).total < lists.spans(4, 2).total, "another span, another list"
    assert lists.tiles(9, 8).total > lists.tiles(3, 8).total, "other heads, another list"


def test_layers_of_a_step_share_the_lists_and_the_next_step_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[WorkLists] = []

    def note(q: mx.array, k: mx.array, v: mx.array, pool: object, pages: Pages, work: WorkLists) -> object:
        assert work.pages is pages
        seen.append(work)
        return q, pool

    monkeypatch.setattr(paged, "paged_attention", note)
    cache = PagedCache(KvFormat(2, 1, 8, 4, mx.float32), max_blocks=4)
    cache.prepare(Plan([], 4, [], [], []))
    x = mx.zeros((1, 1, 8))
    for step in (4, 5):
        at = mx.array([step])
        batch = Batch(at, at, (0, 1), at, pages_of([step], [1]))
        for layer in range(2):
            cache.attend(layer, x, x, x, batch)
    first, second = seen[::2]
    assert seen[:2] == [first] * 2 and seen[2:] == [second] * 2 and first is not second
