"""Chapter 2.6: what attention reads of keys and values, by rows and by tiles, by metalsim. --svg draws.

python book/experiments/flash_attention_gpu.py [--svg book/docs/img/flash_attention_gpu.svg]
python book/experiments/flash_attention_gpu.py --mine my_llm
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from command_line import parser_of

from book.course.overlay import VARIABLE
from tiny_llm.data import Pages
from tiny_llm.metalsim.build import why_not
from tiny_llm.metalsim.run import Traffic, watch
from tiny_llm.ops import paged_attention as attention
from tiny_llm.ops.backend import use
from tiny_llm.ops.kv_pool import Pool
from tiny_llm.ops.work_lists import WorkLists

HEADS, DIM, SIZE, CONTEXT = 7, 64, 16, 64  # one of Qwen2-0.5B's two key heads, and its query heads
STYLE = (
    "svg{background:#fff}rect{fill:#f3f3f3;stroke:#999}.a{fill:#e3ecf5}.one{fill:#f2a65a}.seen{fill:#e3ecf5}"
    ".ahead{fill:#fff}.none{fill:#ddd}"
    "text{font:11px monospace;fill:#333;text-anchor:middle}.left{text-anchor:start}"
)


def traffic(rows: int, *, tiles: bool) -> Traffic:
    """What attention of a context's last ``rows`` reads."""
    blocks = CONTEXT // SIZE
    table = mx.arange(blocks, dtype=mx.int32)[None]
    pages = Pages(mx.zeros((rows,), mx.int32), table, mx.array([0, rows]), mx.array([CONTEXT]))
    q = mx.random.normal((rows, HEADS, DIM), key=mx.random.key(0)).astype(mx.bfloat16)
    keys = mx.random.normal((blocks, 1, DIM, SIZE), key=mx.random.key(1)).astype(mx.bfloat16)
    pool: Pool = (keys, mx.contiguous(keys.swapaxes(2, 3)))
    run = attention._tiles if tiles else attention._rows
    with watch() as seen:
        mx.eval(run(q, pool, WorkLists(pages), 0.125)[0])
    return seen[0][1]


def table() -> Iterator[str]:
    """Bytes of keys and values: as threads ask for them, and how often each is asked for."""
    whole = 2 * CONTEXT * DIM * 2
    yield "rows   kernel   queries   threadgroups   KB read   each byte   bytes a query"
    for rows in (1, 2, 4, 8, 16):
        for tiles in (False, True):
            queries = rows * HEADS
            groups = -(-queries // 16) if tiles else rows
            read = sum(traffic(rows, tiles=tiles).read[name] for name in ("keys", "values"))
            kind = "tiles" if tiles else "rows"
            yield (
                f"{rows:>4} {kind:>8} {queries:>9} {groups:>14} {read / 1e3:>9.1f} {read / whole:>9.1f} x "
                f"{read / queries:>14.0f}"
            )


def place(lane: int) -> tuple[int, int]:
    """Row and first column of a lane's two elements."""
    return (lane // 4 & 4) + lane // 2 % 4, (lane // 4 & 2) * 2 + lane % 2 * 2


def layout() -> Iterator[str]:
    """Which lane holds which element."""
    for lane in range(32):
        row, column = place(lane)
        for i in range(2):
            x, y = 44 + 34 * (column + i), 54 + 28 * row
            kind = "one" if row == 2 else "a" if (row // 4 + column // 4) % 2 else "plain"
            yield f'<rect class="{kind}" x="{x}" y="{y}" width="34" height="28"/>'
            yield f'<text x="{x + 17}" y="{y + 18}">{lane}</text>'
    for i in range(8):
        yield f'<text x="{61 + 34 * i}" y="46">{i}</text>'
        yield f'<text x="30" y="{72 + 28 * i}">{i}</text>'


def tile() -> Iterator[str]:
    """16 places of a tile, of which 14 are taken by two rows of seven heads, and two blocks of keys."""
    for n in range(16):
        y = 54 + 14 * n
        words = f"row {n // HEADS}, head {n % HEADS}" if n < 2 * HEADS else "none: not stored"
        yield f'<text class="left" x="360" y="{y + 11}">{words}</text>'
        for token in range(16):
            seen = token < 11 + min(n, 13) // HEADS
            kind = "none" if n >= 2 * HEADS else "seen" if seen else "ahead"
            x = 480 + 16 * token
            yield f'<rect class="{kind}" x="{x}" y="{y}" width="16" height="14"/>'
    for token in range(16):
        yield f'<text x="{488 + 16 * token}" y="46">{token}</text>'


def picture() -> str:
    """The layout of a matrix, and a tile, as an SVG."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 310"><style>{STYLE}</style>'
    texts = [
        '<text class="left" x="4" y="16">The lane of each element of an 8 x 8 matrix.</text>',
        '<text class="left" x="360" y="16">A tile: 16 queries, and a block of 16 keys,</text>',
        '<text class="left" x="360" y="30">of which there are 12. Blue: seen.</text>',
        '<text class="left" x="4" y="300">Orange: row 2 lies in lanes 4, 5, 12 and 13, which differ in bits 0'
        " and 3.</text>",
    ]
    return "\n".join([head, *texts, *layout(), *tile(), "</svg>\n"])


def main() -> None:
    """Print the table, and draw."""
    parser = parser_of(__doc__)
    parser.add_argument("--mine", type=Path, help="a learner's folder, whose kernel is run")
    arguments = parser.parse_args()
    if arguments.mine:  # it must be there before the package is loaded
        environment = {**os.environ, VARIABLE: str(arguments.mine.resolve())}
        sys.exit(subprocess.run([sys.executable, sys.argv[0]], env=environment, check=False).returncode)
    if arguments.svg:
        arguments.svg.write_text(picture(), encoding="utf-8")
    if reason := why_not():
        sys.exit(reason)
    with use("metalsim"):
        for line in table():
            print(line)


if __name__ == "__main__":
    main()
