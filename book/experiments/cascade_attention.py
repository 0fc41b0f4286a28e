"""Chapter 4.6: what attention reads when rows begin alike, foretold and counted by metalsim. --svg draws.

python book/experiments/cascade_attention.py [--mistakes] [--svg book/docs/img/cascade_attention.svg]
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count
from typing import cast

import mlx.core as mx
from by_mistakes import show, told_with

from tiny_llm.data import Pages
from tiny_llm.metalsim.build import why_not
from tiny_llm.metalsim.run import watch
from tiny_llm.ops import paged_attention as attention
from tiny_llm.ops.backend import use
from tiny_llm.ops.kv_pool import Pool
from tiny_llm.ops.work_lists import MOST_ROWS, SpanPieces, SpanWork, WorkLists

HEADS, DIM, SIZE, SPAN = 7, 64, 16, 128  # one of Qwen2-0.5B's two key heads, and its query heads
SHARED, OWN = 256, 16  # tokens
SHOWN = (
    "same-block-same-place",
    "the-last-span-too",
    "half-a-span",
    "also-who-is-alone",
    "all-rows-at-once",
    "own-from-the-beginning",
    "own-in-front",
)
COLORS = ("#f3c795", "#a9c8e6", "#b5d8b0", "#e2b6d3", "#d9cb9a", "#a8d5d5", "#eeb3ae", "#c9c3ea", "#c4c4c4")

Tables = list[list[int]]


def pages_of(tables: Tables, lens: Sequence[int]) -> Pages:
    """A row at the end of each sequence."""
    width, rows = max(map(len, tables)), len(lens)
    wide = [table + [-1] * (width - len(table)) for table in tables]
    return Pages(*(mx.array(x, mx.int32) for x in ([0] * rows, wide, [*range(rows + 1)], [*lens])))


def counted(rows: int) -> tuple[int, int]:
    """Bytes of keys and values that ``rows`` rows fetch, and bytes of parts that the merge fetches."""
    begin = SHARED // SIZE
    tables = [[*range(begin), begin + row] for row in range(rows)]
    keys = mx.random.normal((begin + rows, 1, DIM, SIZE), key=mx.random.key(1)).astype(mx.bfloat16)
    pool: Pool = (keys, mx.contiguous(keys.swapaxes(2, 3)))
    q = mx.random.normal((rows, HEADS, DIM), key=mx.random.key(0)).astype(mx.bfloat16)
    with use("metalsim"), watch() as seen:
        lists = WorkLists(pages_of(tables, [SHARED + OWN] * rows))
        mx.eval(attention._rows(q, pool, lists, DIM**-0.5)[0])
    read = sum(sum(t.fetched[x] for x in ("keys", "values")) for name, t in seen if name == "paged_attention")
    parts = sum(sum(t.fetched[x] for x in ("shared", "own")) for name, t in seen if name != "paged_attention")
    return read, parts


def table() -> str:
    """Rows of one prompt: bytes apart, foretold and counted."""
    token = 2 * DIM * 2  # bytes of a key and a value in bfloat16
    lines = [
        f"{SHARED} tokens shared, {OWN} of each row's own; KB of one key head",
        "rows   apart   foretold   counted   of apart   parts",
    ]
    for rows in (1, 2, 4, 8, 16, 32):
        apart = rows * (SHARED + OWN) * token
        foretold = (-(-rows // MOST_ROWS) * SHARED + rows * OWN) * token
        read, parts = counted(rows)
        lines.append(
            f"{rows:>4} {apart / 1e3:>7.1f} {foretold / 1e3:>10.1f} {read / 1e3:>9.1f} {read / apart:>10.0%} "
            f"{parts / 1e3:>7.1f}"
        )
    return "\n".join(lines)


def numbers(pieces: SpanPieces) -> list[list[int]]:
    """The pieces, each of five numbers."""
    return cast(Tables, pieces.pieces[: 5 * pieces.total].reshape(-1, 5).tolist() if pieces.total else [])


def tree(seed: int, sequences: int) -> tuple[Tables, list[int]]:
    """Sequences of which most begin like one before, in blocks of 2; their lengths."""
    chance, fresh = random.Random(seed), count(65_530)
    tables: Tables = []
    lens = [chance.randint(1, 60) for _ in range(sequences)]
    for length in lens:
        begin = chance.choice(tables)[: chance.randrange(30)] if tables and chance.random() < 0.9 else []
        if begin and chance.random() < 0.2:  # the same text behind another first block
            begin[0] = next(fresh)
        tables.append((begin + [next(fresh) for _ in range(30)])[: -(-length // 2)])
    return tables, lens


def seen_by(work: SpanWork, row: int, tables: Tables, size: int) -> list[tuple[int, int]]:
    """The positions and blocks that a row meets by its lists, in the order of its parts."""
    first, end = cast(list[int], work.firsts[row : row + 2].tolist())
    found = []
    for place in cast(list[int], work.order[first:end].tolist()):
        is_shared = place < work.shared.places
        pieces, at = (work.shared, place) if is_shared else (work.own, place - work.shared.places)
        for begin, members, who, seen, span in numbers(pieces):
            if begin <= at < begin + members and pieces.rows[at].item() == row:
                tokens = range(span * size, min(seen, (span + 1) * size))
                found += [(token, tables[who][token // 2]) for token in tokens]
    return found


def told() -> str:
    """Twenty steps of 24 rows, in a line: rows that meet another text, tokens read, the largest piece."""
    wrong = read = apart = largest = 0
    size, end = 8, ""
    try:
        for seed in range(20):
            tables, lens = tree(seed, 24)
            work = WorkLists(pages_of(tables, lens)).spans(size, 24, 2)
            for row, (own, length) in enumerate(zip(tables, lens, strict=True)):
                wrong += seen_by(work, row, tables, size) != [(at, own[at // 2]) for at in range(length)]
            for pieces in (work.shared, work.own):
                for _, members, _, seen, span in numbers(pieces):
                    read += min(seen, (span + 1) * size) - span * size
                    largest = max(largest, members)
            apart += sum(lens)
    except (AssertionError, LookupError, ValueError, TypeError) as error:
        end = f"   {type(error).__name__} in step {seed + 1}"
    return f"{wrong / 480:>7.1%} {read / max(1, apart):>7.1%} {largest:>8}{end}"


def mistakes() -> str:
    """The steps with mistakes of this chapter, each in a process of its own."""
    lines = [f"{'mistake':<24} wrong    read   at once"]
    return "\n".join(lines + [f"{name:<22} {line}" for name, line in told_with(__file__, "4.6", SHOWN)])


DRAWN = [[1, 2, 3], [1, 2, 4], [1, 2, 5, 6], [1, 7, 8], [9, 1]]
"""Blocks of one span each, so that a number stands for a span."""


def picture() -> str:
    """On the left what five rows see, on the right what is read: a colour is a span."""
    work = WorkLists(pages_of(DRAWN, [len(own) for own in DRAWN])).spans(1, 5, 1)
    parts = [
        '<text x="16" y="22">five rows, and the spans that they see</text>',
        '<text x="420" y="22">what is read, and for whom</text>',
    ]
    for row, own in enumerate(DRAWN):
        parts.append(f'<text class="n" x="16" y="{62 + 44 * row}">row {row}</text>')
        parts += [cell(70 + 76 * span, 40 + 44 * row, block) for span, block in enumerate(own)]
    depth: dict[int, int] = {}
    for pieces in (work.shared, work.own):
        for first, members, who, _, span in numbers(pieces):
            level = depth[span] = depth.get(span, -1) + 1
            x, y = 420 + 84 * span, 40 + 44 * level
            rows = map(str, cast(list[int], pieces.rows[first : first + members].tolist()))
            parts.append(cell(x, y, DRAWN[who][span], " ".join(rows), members > 1))
    style = "svg{background:#fff}text{font:13px monospace;fill:#333}.n{font-size:12px;fill:#777}"
    style += "rect{stroke:#999}.s{stroke:#333;stroke-width:2.5}"
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 270">'
    return "\n".join([f"{head}<style>{style}</style>", *parts, "</svg>\n"])


def cell(x: int, y: int, block: int, words: str = "", thick: bool = False) -> str:
    """A span."""
    name = ' class="s"' if thick else ""
    color = COLORS[(block - 1) % len(COLORS)]
    box = f'<rect{name} fill="{color}" x="{x}" y="{y}" width="70" height="34" rx="4"/>'
    return f'{box}<text x="{x + 8}" y="{y + 22}">{words}</text>'


def main() -> None:
    """Print the table, and draw."""
    if reason := why_not():
        raise SystemExit(f"metalsim cannot run here: {reason}")
    show(__doc__, table, picture, mistakes, told)


if __name__ == "__main__":
    main()
