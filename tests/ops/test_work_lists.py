"""The Metal attention kernels' work lists: every row's work, once, and one list for all layers of a step."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm.data import Batch, Pages, Plan
from tiny_llm.kv import paged
from tiny_llm.kv.paged import PagedCache
from tiny_llm.ops.kv_pool import KvFormat
from tiny_llm.ops.work_lists import MOST_ROWS, WorkLists


def pages_of(lens: list[int], new: list[int], tables: list[list[int]] | None = None) -> Pages:
    """Sequences of ``lens`` tokens, the last ``new`` of each in this step; in these blocks, or their own."""
    starts = [sum(new[:b]) for b in range(len(new) + 1)]
    width = max(lens)
    tables = tables or [list(range(b * width, (b + 1) * width)) for b in range(len(lens))]
    return Pages(*(mx.array(x, mx.int32) for x in ([0] * starts[-1], tables, starts, lens)))


def rows_of(pieces: mx.array, count: int, width: int) -> object:
    return pieces[: count * width].reshape(count, width).tolist()


def test_spans_cover_what_each_row_sees() -> None:
    spans = WorkLists(pages_of([9, 3], [1, 1])).spans(4, 2, 2)
    rows = [[0, 1, 0, 9, 0], [1, 1, 0, 9, 1], [2, 1, 0, 9, 2], [3, 1, 1, 3, 0]]
    assert rows_of(spans.own.pieces, spans.own.total, 5) == rows, "place, rows, sequence, tokens seen, span"
    assert spans.own.rows[:4].tolist() == [0, 0, 0, 1] and spans.own.places == 4
    assert spans.order[:4].tolist() == [0, 1, 2, 3] and spans.firsts[:3].tolist() == [0, 3, 4]
    assert spans.shared.total == spans.shared.places == 0


def test_spans_with_the_same_blocks_are_one_piece_for_all_who_see_them_whole() -> None:
    """Spans of two blocks of two tokens. A row's last span is its own, and so are all behind its own."""
    tables = [
        [1, 2, 3, 4, 5, 0],
        [1, 2, 3, 4, 6, 0],
        [1, 2, 8, 4, 3, 9],
        [1, 2, 3, 4, 0, 0],
        [1, 7, 3, 4, 5, 9],
    ]
    spans = WorkLists(pages_of([9, 10, 12, 8, 12], [1] * 5, tables)).spans(4, 5, 2)
    shared = [[0, 4, 0, 9, 0], [4, 2, 0, 9, 1]]
    assert rows_of(spans.shared.pieces, spans.shared.total, 5) == shared
    assert spans.shared.rows[:6].tolist() == [0, 1, 2, 3, 0, 1] and spans.shared.places == 6
    own = [[0, 2], [1, 2], [2, 1], [3, 2], [4, 1], [5, 0], [6, 1], [7, 2]]
    pieces = spans.own.pieces[: 5 * spans.own.total].reshape(-1, 5)
    assert pieces[:, [0, 4]].tolist() == own, "place and span"
    assert spans.own.rows[:8].tolist() == [0, 1, 2, 2, 3, 4, 4, 4]
    assert spans.order.tolist() == [0, 4, 6, 1, 5, 7, 2, 8, 9, 3, 10, 11, 12, 13]
    assert spans.firsts[:6].tolist() == [0, 3, 6, 9, 11, 14]


def test_a_shared_span_of_many_rows_is_cut() -> None:
    rows = MOST_ROWS + 3
    tables = [[0, 1 + row] for row in range(rows)]
    shared = WorkLists(pages_of([5] * rows, [1] * rows, tables)).spans(4, rows, 4).shared
    assert rows_of(shared.pieces, shared.total, 5) == [
        [0, MOST_ROWS, 0, 5, 0],
        [MOST_ROWS, 3, MOST_ROWS, 5, 0],
    ]


def test_rows_of_a_sequence_share_what_they_see() -> None:
    """Where no tiles can be: all but each row's last span."""
    shared = WorkLists(pages_of([9], [5])).spans(4, 5, 2).shared
    assert rows_of(shared.pieces, shared.total, 5) == [[0, 5, 0, 5, 0]]
    assert shared.rows[:5].tolist() == [0, 1, 2, 3, 4], "they see 5 to 9"


def test_tiles_cover_each_pair_of_a_row_and_a_head() -> None:
    pieces, count = WorkLists(pages_of([9, 3], [3, 1])).tiles(3, 8)
    assert rows_of(pieces, count, 5) == [[0, 3, 0, 7, 0], [0, 3, 0, 7, 8], [3, 1, 1, 3, 0]]


def test_rows_of_decodes_and_of_chunks_make_two_lists() -> None:
    lists = WorkLists(pages_of([5, 3, 9, 4], [1, 1, 3, 1]))
    assert lists.decodes == 2, "one that comes after a chunk is not counted"
    spans = lists.spans(4, 2, 2).own
    assert rows_of(spans.pieces, spans.total, 5) == [[0, 1, 0, 5, 0], [1, 1, 0, 5, 1], [2, 1, 1, 3, 0]]
    tiles = lists.tiles(2, 8, 2)
    assert rows_of(tiles.pieces, tiles.total, 5) == [[0, 3, 2, 7, 0], [3, 1, 3, 4, 0]], (
        "rows from the third on"
    )


def test_a_short_list_is_no_other_kernel_than_a_long_one() -> None:
    """MLX passes inputs of fewer than 8 elements as constants: the same text is compiled once more."""
    lists = WorkLists(pages_of([1], [1]))
    spans = lists.spans(4, 1, 2)
    lengths = {array.size for array in (*spans.own[:2], *spans.shared[:2], spans.order, spans.firsts)}
    assert lengths == {8} and lists.tiles(1, 8).pieces.size == 8


def test_a_list_is_made_once() -> None:
    lists = WorkLists(pages_of([9], [1]))
    assert lists.spans(4, 1, 2) is lists.spans(4, 1, 2)
    assert lists.tiles(3, 8) is lists.tiles(3, 8)
    assert lists.spans(8, 1, 2).own.total < lists.spans(4, 1, 2).own.total, "another span, another list"
    assert lists.tiles(9, 8).total > lists.tiles(3, 8).total, "other heads, another list"


def test_spans_before_a_window_are_no_work() -> None:
    lists = WorkLists(pages_of([9, 9], [1, 1]))
    assert [lists.spans(4, 2, 2, window).own.total for window in (9, 8, 5, 1)] == [6, 6, 4, 2]


def test_layers_of_a_step_share_the_lists_and_the_next_step_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[WorkLists] = []

    def note(
        q: mx.array, k: mx.array, v: mx.array, pool: object, pages: Pages, work: WorkLists, *, window: int
    ) -> object:
        assert work.pages is pages and not window
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
