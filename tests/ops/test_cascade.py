"""Spans that several rows share: who shares what, each row's parts in order, bytes, and bits as if alone."""

from __future__ import annotations

import random
from array import array
from itertools import count
from typing import cast

import mlx.core as mx
import pytest

from tiny_llm.data import Pages
from tiny_llm.metalsim.run import watch
from tiny_llm.ops import paged_attention as attention
from tiny_llm.ops.kv_pool import Pool
from tiny_llm.ops.work_lists import (
    MOST_ROWS,
    UNBOUNDED,
    SpanPieces,
    SpanWork,
    WorkLists,
    _alone,
    _groups,
    _spans,
    _together,
)

pytestmark = pytest.mark.chapter("4.6")

Tables = list[list[int]]


def pages_of(tables: Tables, lens: list[int], new: list[int] | None = None) -> Pages:
    """Sequences of ``lens`` tokens in these blocks; the last ``new`` of each are the step's rows."""
    new, width = new or [1] * len(lens), max(map(len, tables))
    starts = [sum(new[:b]) for b in range(len(new) + 1)]
    wide = [table + [-1] * (width - len(table)) for table in tables]
    return Pages(*(mx.array(x, mx.int32) for x in ([0] * starts[-1], wide, starts, lens)))


def groups_of(tables: Tables, seen: list[int], size: int, block_size: int) -> list[tuple[int, list[int]]]:
    """What ``_groups`` says of rows of one sequence each: span and rows."""
    rows = [(row, row, tokens) for row, tokens in enumerate(seen)]
    wide = pages_of(tables, seen).block_tables
    found = list(_groups(rows, wide, size, block_size))
    assert all((row, sequence, tokens) in rows for _, group in found for row, sequence, tokens in group)
    return [(span, [row for row, _, _ in group]) for span, group in found]


def listed(pieces: SpanPieces) -> list[list[int]]:
    """The pieces as lists of five."""
    return cast(Tables, pieces.pieces[: 5 * pieces.total].reshape(-1, 5).tolist() if pieces.total else [])


def parts_of(work: SpanWork, row: int) -> list[tuple[int, int, int, bool]]:
    """A row's parts in order: span, whose table, tokens seen, and whether others read it, too."""
    first, end = cast(list[int], work.firsts[row : row + 2].tolist())
    found = []
    for place in cast(list[int], work.order[first:end].tolist()):
        shared = place < work.shared.places
        pieces, at = (work.shared, place) if shared else (work.own, place - work.shared.places)
        (one,) = [p for p in listed(pieces) if p[0] <= at < p[0] + p[1]]
        assert pieces.rows[at].item() == row, f"place {place} is another row's"
        found.append((one[4], one[2], one[3], one[1] > 1))
    return found


def test_two_who_begin_alike() -> None:
    """Spans of two blocks: the third block differs, so the second span is not shared."""
    assert groups_of([[1, 2, 3, 4, 5], [1, 2, 6, 4, 5]], [9, 9], 4, 2) == [(0, [0, 1])]


def test_what_comes_behind_a_difference_is_not_shared() -> None:
    """The same block in the same place is no sign of the same beginning."""
    assert groups_of([[1, 2, 3], [9, 2, 3], [9, 2, 4]], [7, 7, 7], 2, 2) == [(0, [1, 2]), (1, [1, 2])]


def test_a_rows_last_span_is_its_own() -> None:
    """It is being written. Of three with the same blocks, who sees 4, 5 and 9 tokens?"""
    assert groups_of([[1, 2, 3]] * 3, [4, 5, 9], 4, 4) == [(0, [1, 2])]
    assert groups_of([[1, 2, 3]] * 3, [8, 9, 9], 4, 4) == [(0, [0, 1, 2]), (1, [1, 2])]
    assert groups_of([[1], [1]], [4, 4], 4, 4) == [] and groups_of([[1], [1]], [5, 5], 4, 4) == [(0, [0, 1])]


def test_who_is_alone_is_in_no_group() -> None:
    assert groups_of([[1, 2], [3, 4]], [8, 8], 4, 4) == [] and groups_of([[1, 2]], [8], 4, 4) == []
    assert list(_groups([], mx.zeros((0, 3), mx.int32), 4, 4)) == []


def test_groups_part_from_span_to_span() -> None:
    """Two pairs inside of five; a pair that parts later. In order of spans, rows in their order."""
    tables = [[1, 2, 3, 9], [1, 4, 5, 9], [1, 2, 6, 9], [1, 4, 5, 8], [7, 2, 3, 9], [1, 0, 0, 0]]
    assert groups_of(tables, [7, 7, 7, 7, 7, 3], 2, 2) == [
        (0, [0, 1, 2, 3, 5]),
        (1, [0, 2]),
        (1, [1, 3]),
        (2, [1, 3]),
    ]


def test_groups_are_in_the_order_of_their_first_rows() -> None:
    tables = [[1, 2, 0], [3, 4, 0], [1, 2, 0], [1, 2, 0], [3, 4, 0]]
    assert groups_of(tables, [5] * 5, 2, 2) == [(0, [0, 2, 3]), (0, [1, 4]), (1, [0, 2, 3]), (1, [1, 4])]


def test_tables_are_compared_by_whole_numbers() -> None:
    """Blocks 1 and 257 have the same lowest byte, -1 and 65535 the same two."""
    assert groups_of([[257, 0], [1, 0]], [5, 5], 2, 2) == []
    assert groups_of([[1, 2**20], [1, 2**20]], [4, 4], 2, 2) == [(0, [0, 1])]


def test_rows_of_one_sequence_read_together() -> None:
    """Its own table twice: rows that see 5, 6 and 7 tokens share the first span."""
    rows = [(3, 1, 5), (4, 1, 6), (5, 1, 7)]
    tables = pages_of([[8, 9], [1, 2]], [7, 7]).block_tables
    assert list(_groups(rows, tables, 4, 4)) == [(0, rows)]


def test_pieces_of_a_shared_span() -> None:
    """First place, rows, a sequence with these blocks, what its row sees, the span."""
    places = {row: array("i") for row in (2, 3, 5)}
    groups = [(0, [(2, 7, 30), (3, 8, 40), (5, 9, 50)]), (1, [(3, 8, 40), (5, 9, 50)])]
    pieces = _together(groups, places)
    assert listed(pieces) == [[0, 3, 7, 30, 0], [3, 2, 8, 40, 1]]
    assert pieces.rows[:5].tolist() == [2, 3, 5, 3, 5] and (pieces.total, pieces.places) == (2, 5)
    assert {row: [*own] for row, own in places.items()} == {2: [0], 3: [1, 3], 5: [2, 4]}


def test_many_rows_are_cut_into_pieces() -> None:
    """None has more than MOST_ROWS, and none is empty."""
    for rows, expected in ((MOST_ROWS, 1), (MOST_ROWS + 1, 2), (2 * MOST_ROWS, 2), (2 * MOST_ROWS + 3, 3)):
        places = {row: array("i") for row in range(rows)}
        pieces = _together([(4, [(row, 100 + row, 900 + row) for row in range(rows)])], places)
        found = listed(pieces)
        assert [one[0] for one in found] == [MOST_ROWS * i for i in range(expected)]
        assert [one[1] for one in found] == [min(MOST_ROWS, rows - first) for first, *_ in found]
        assert [one[2:] for one in found] == [[100 + f, 900 + f, 4] for f, *_ in found], "its first row's"
        assert [own.tolist() for own in places.values()] == [[row] for row in range(rows)]


def test_no_groups_no_pieces() -> None:
    pieces = _together([], {})
    assert (pieces.total, pieces.places) == (0, 0)


def test_pieces_of_a_rows_own() -> None:
    """From where its shared spans end; a place is counted from ``behind``."""
    places = {0: array("i", [0, 2]), 1: array("i"), 4: array("i", [1])}
    pieces = _alone([(0, 0, 9), (1, 3, 4), (4, 2, 13)], places, 3, 4, UNBOUNDED)
    assert listed(pieces) == [
        [0, 1, 0, 9, 2],
        [1, 1, 3, 4, 0],
        [2, 1, 2, 13, 1],
        [3, 1, 2, 13, 2],
        [4, 1, 2, 13, 3],
    ]
    assert pieces.rows[:5].tolist() == [0, 1, 4, 4, 4] and (pieces.total, pieces.places) == (5, 5)
    assert {row: [*own] for row, own in places.items()} == {0: [0, 2, 3], 1: [4], 4: [1, 5, 6, 7]}


@pytest.mark.parametrize(
    ("window", "spans"), [(9, [0, 1, 2]), (8, [0, 1, 2]), (6, [0, 1, 2]), (5, [1, 2]), (2, [1, 2]), (1, [2])]
)
def test_spans_before_a_window_are_no_work(window: int, spans: list[int]) -> None:
    """A row that sees 9 tokens in spans of 4: with a window of 5 these are 4 to 8."""
    places = {0: array("i")}
    assert [piece[4] for piece in listed(_alone([(0, 0, 9)], places, 0, 4, window))] == spans


def test_rows_find_their_parts() -> None:
    """Two share spans 0 and 1, one has all to itself. Places of own parts come behind all shared ones."""
    rows = [(0, 5, 11), (1, 6, 3), (2, 7, 9)]
    groups = [(0, [rows[0], rows[2]]), (1, [rows[0], rows[2]])]
    work = _spans(rows, groups, 4, UNBOUNDED)
    assert listed(work.shared) == [[0, 2, 5, 11, 0], [2, 2, 5, 11, 1]]
    assert listed(work.own) == [[0, 1, 5, 11, 2], [1, 1, 6, 3, 0], [2, 1, 7, 9, 2]]
    assert work.order.tolist() == [0, 2, 4, 5, 1, 3, 6, 0], (
        "row after row, each one's parts in the order of its spans"
    )
    assert work.firsts[:4].tolist() == [0, 3, 4, 7], "where each row begins, and where the last one ends"


def test_rows_that_do_not_begin_at_0() -> None:
    work = _spans([(0, 0, 9), (1, 0, 10)], [(0, [(0, 0, 9), (1, 0, 10)])], 4, 6)
    assert work.order[:6].tolist() == [0, 2, 3, 1, 4, 5] and work.firsts[:3].tolist() == [0, 3, 6]
    assert _spans([(0, 0, 9)], [], 4, 5).order[:2].tolist() == [0, 1], "a window leaves spans 1 and 2"


def test_no_list_is_short() -> None:
    """MLX passes inputs of fewer than 8 numbers in another way, and would compile the kernel once more."""
    work = _spans([(0, 0, 3)], [], 4, UNBOUNDED)
    assert {array.size for array in (work.order, work.firsts)} == {8}
    many = _spans([(0, 0, 45)], [], 4, UNBOUNDED)
    assert many.order.tolist() == [*range(12)] and many.firsts[:2].tolist() == [0, 12]


def test_rows_know_what_they_see() -> None:
    """Three of a sequence's last rows, one of another; spans of 4, blocks of 2."""
    work = WorkLists(pages_of([[1, 2, 3, 4], [5, 6, 7, 8]], [7, 6], [3, 1])).spans(4, 4, 2)
    assert parts_of(work, 0) == [(0, 0, 5, True), (1, 0, 5, False)]
    assert parts_of(work, 2) == [(0, 0, 5, True), (1, 0, 7, False)]
    assert parts_of(work, 3) == [(0, 1, 6, False), (1, 1, 6, False)]
    fewer = WorkLists(pages_of([[1, 2, 3, 4], [5, 6, 7, 8]], [7, 6], [3, 1])).spans(4, 2, 2)
    assert fewer.own.places == 2 and fewer.shared.places == 2, "the first two rows alone"
    inside = WorkLists(pages_of([[1, 2, 3], [4, 5, 6]], [6, 6], [1, 4])).spans(4, 2, 2)
    assert [one[3] for one in listed(inside.own)] == [6, 6, 3], "row 1 is the second sequence's first of four"


def test_who_has_left_its_window_behind_reads_alone() -> None:
    """Two see 8 tokens, two 12, of the same blocks; with a window of 8 the last two begin at token 4."""
    pages = pages_of([[1, 2, 3]] * 4, [8, 8, 12, 12])
    work = WorkLists(pages).spans(4, 4, 4, 8)
    assert [(one[4], one[1]) for one in listed(work.shared)] == [(0, 2)]
    assert parts_of(work, 1) == [(0, 0, 8, True), (1, 1, 8, False)]
    assert parts_of(work, 3) == [(1, 3, 12, False), (2, 3, 12, False)]


def test_a_list_is_made_once_for_all_layers() -> None:
    lists = WorkLists(pages_of([[1, 2], [1, 3]], [7, 7]))
    first = lists.spans(4, 2, 4)
    assert lists.spans(4, 2, 4) is first and lists.spans(4, 2, 4, 5) is not first
    assert lists.spans(4, 1, 4) is not first and lists.spans(8, 2, 4) is not first
    assert lists.spans(4, 2, 2) is not first


def tree(seed: int, sequences: int, size: int) -> tuple[Tables, list[int]]:
    """Tables of sequences that begin like others before them, and lengths, in blocks of 2."""
    chance, fresh = random.Random(seed), count(1)
    tables: Tables = []
    lens = [chance.randint(1, 10 * size) for _ in range(sequences)]
    for length in lens:
        begin = (
            chance.choice(tables)[: chance.randrange(5 * size)] if tables and chance.random() < 0.8 else []
        )
        blocks = -(-length // 2)
        tables.append((begin + [next(fresh) for _ in range(blocks)])[:blocks])
    return tables, lens


@pytest.mark.parametrize("size", [2, 4, 8])
def test_each_row_meets_each_token_once_and_what_is_shared_is_read_once(size: int) -> None:
    """Trees of tables, made up: what rows read by their lists is their own, and none is read twice."""
    for seed in range(6):
        tables, lens = tree(seed, 12, size)
        work = WorkLists(pages_of(tables, lens)).spans(size, 12, 2)
        read = [(span, *tables[who][: (span + 1) * size // 2]) for _, _, who, _, span in listed(work.shared)]
        assert len(set(read)) == len(read), "a shared span is read twice"
        for row, (table, length) in enumerate(zip(tables, lens, strict=True)):
            parts = parts_of(work, row)
            assert [part[0] for part in parts] == [*range(-(-length // size))], "all spans, in their order"
            for span, sequence, seen, shared in parts:
                here = slice(span * size // 2, (span + 1) * size // 2)
                assert tables[sequence][here] == table[here], "another text's blocks"
                assert not shared or min(seen, lens[row]) > (span + 1) * size, "a last span is a row's own"
                others = [
                    o
                    for o in range(12)
                    if tables[o][: here.stop] == table[: here.stop] and lens[o] > (span + 1) * size
                ]
                assert shared == (len(others) > 1 and row in others), f"row {row} and {others} in span {span}"


SHARED, D = 8, 32  # blocks of 16 tokens; columns


def paged(rows: int, shared: int = SHARED) -> tuple[mx.array, Pool, WorkLists]:
    """Rows that share a span of 128 tokens; queries, a pool and lists."""
    tables = [[*range(shared), shared + row] for row in range(rows)]
    blocks = shared + rows
    keys, values = (
        mx.random.normal((blocks, 1, *s), key=mx.random.key(n)) for n, s in enumerate(((D, 16), (16, D)))
    )
    q = mx.random.normal((rows, 2, D), key=mx.random.key(2))
    return q, (keys, values), WorkLists(pages_of(tables, [16 * shared + 1 + row % 9 for row in range(rows)]))


@pytest.mark.usefixtures("where")
def test_bits_and_bytes(where: str) -> None:
    """Each row has the bits that it has alone; the span is fetched once for 16 rows."""
    for rows, times in ((3, 1), (17, 2)):
        q, pool, lists = paged(rows)
        with watch() as seen:
            together, _ = attention._rows(q, pool, lists, D**-0.5)
        for row in (0, rows - 1):
            table, length = lists.pages.block_tables[row : row + 1], lists.pages.context_lens[row : row + 1]
            pages = Pages(mx.zeros((1,), mx.int32), table, mx.array([0, 1], mx.int32), length)
            alone, _ = attention._rows(q[row : row + 1], pool, WorkLists(pages), D**-0.5)
            assert mx.array_equal(alone[0], together[row]).item(), f"row {row} of {rows} has other bits alone"
        if where == "metalsim":
            fetched = sum(traffic.fetched["keys"] for name, traffic in seen if name == "paged_attention")
            own = sum(1 + row % 9 for row in range(rows))
            assert fetched == (times * 128 + own) * D * 4, "bytes of keys"
