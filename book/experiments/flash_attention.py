"""Chapter 2.5: what attention takes of memory, and how long it takes by keys a span. --svg draws.

python book/experiments/flash_attention.py [--svg book/docs/img/flash_attention.svg]
python book/experiments/flash_attention.py --speed [--mine my_llm]
"""

from __future__ import annotations

import ctypes
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from command_line import parser_of

from book.course.native import CPU, build
from tiny_llm.ops.attention import attention_ref
from tiny_llm.ops.backend import use

HEADS, KV_HEADS, DIM, BLOCK = 14, 2, 64, 64  # Qwen2-0.5B's
PROMPTS = (128, 256, 512)
SPANS, NEW, CONTEXT, TURNS = (64, 256, 2048, 16384), 256, 16384, 3
ROWS_AT_ONCE = 16
SPAN_LINE = "constexpr int64_t kSpan = 256;"
EXAMPLE = ((0.4, 1.0, -0.5, 2.6), (0.1, 3.2, 1.5, -1.0))  # scores of one row, in two spans
STYLE = (
    "svg{background:#fff}rect,path{stroke:#999}.done{fill:#e3ecf5}.now{fill:#f2a65a}.later{fill:#f3f3f3}"
    ".never{fill:#fff;stroke-dasharray:3 3}text{font:11px monospace;fill:#333}.mid{text-anchor:middle}"
)


class Kernel:
    """attention.cpp as a library, perhaps with another number of keys a span and a learner's parts."""

    def __init__(self, *, span: int = 256, mine: Path | None = None, quick: bool = False):
        header = (CPU / "attention.h").read_text(encoding="utf-8")
        assert SPAN_LINE in header
        with tempfile.TemporaryDirectory() as folder:
            changed = header.replace(SPAN_LINE, SPAN_LINE.replace("256", str(span)))
            (Path(folder) / "attention.h").write_text(changed, encoding="utf-8")
            self._library = ctypes.CDLL(str(build("attention", mine, quick=quick, headers=[Path(folder)])))

    def seconds(self, new: int, context: int) -> float:
        """How long one layer's attention takes for the last ``new`` tokens of ``context``."""
        draw = np.random.default_rng(0).standard_normal
        blocks = context // BLOCK
        sizes = ((new, HEADS, DIM), (blocks, KV_HEADS, DIM, BLOCK), (blocks, KV_HEADS, BLOCK, DIM))
        q, keys, values = (draw(size, dtype=np.float32) for size in sizes)
        out = np.empty_like(q)
        numbers = (new, HEADS, KV_HEADS, DIM, blocks, BLOCK, context, 1 << 62)
        table = np.arange(blocks, dtype=np.int32)
        places = [q.ctypes, keys.ctypes, values.ctypes, None, None, table.ctypes, out.ctypes]
        pointers = [place and ctypes.c_void_p(place.data) for place in places]
        began = time.perf_counter()
        self._library.attention(*pointers, *map(ctypes.c_int64, numbers), ctypes.c_float(DIM**-0.5))
        return time.perf_counter() - began

    def scratch(self) -> int:
        """Bytes of all that it works in."""
        self._library.scratch_bytes.restype = ctypes.c_int64
        return int(self._library.scratch_bytes())


def peak(tokens: int) -> int:
    """Bytes that the definition takes for a prompt, beyond its inputs."""
    q, k, v = (mx.ones((tokens, heads, DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS))
    mx.eval(q, k, v)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(attention_ref(q, k, v, scale=1.0, offset=0))
    return mx.get_peak_memory() - before


def memory_table() -> Iterator[str]:
    """One layer of a prompt: all scores, what attention_ref takes, and what spans do."""
    yield "tokens   scores, MB   attention_ref, MB   by spans, MB"
    kernel = Kernel(quick=True)
    with use("ref"):
        for tokens in PROMPTS:
            kernel.seconds(tokens, tokens)
            scores = 4 * HEADS * tokens * tokens
            row = (scores / 1e6, peak(tokens) / 1e6, kernel.scratch() / 1e6)
            yield f"{tokens:>6} {row[0]:>12.1f} {row[1]:>19.1f} {row[2]:>14.2f}"


def speed_table(mine: Path | None) -> Iterator[str]:
    """Milliseconds of one layer, and what the loops go through again and again, by keys a span."""
    yield f"keys a span   keys and values, KB   scores, KB   ms for {NEW} of {CONTEXT} tokens"
    kernels = [Kernel(span=span, mine=mine) for span in SPANS]
    runs = [[kernel.seconds(NEW, CONTEXT) for kernel in kernels] for _ in range(TURNS + 1)]
    for span, took in zip(SPANS, zip(*runs[1:], strict=True), strict=True):
        kept, scores = 2 * span * DIM * 4 / 1024, ROWS_AT_ONCE * span * 4 / 1024
        yield f"{span:>11} {kept:>21.0f} {scores:>12.0f} {statistics.median(took) * 1e3:>9.0f}"


def record(scores: Sequence[float]) -> tuple[int, list[float]]:
    """A span's base, and its weights."""
    most = math.ceil(max(scores))
    return most, [2.0 ** (score - most) for score in scores]


def tiles() -> Iterator[str]:
    """The score matrix of 12 rows and 3 spans, and which of its tiles exist when."""
    x0, y0, wide, high = 150, 44, 128, 16
    for span in range(3):
        x = x0 + span * wide
        yield f'<text class="mid" x="{x + wide / 2}" y="36">keys {span * 256} to {span * 256 + 255}</text>'
        for row in range(12):
            y, edge = y0 + row * high, (row + 21) * 24  # a row sees the keys before its edge
            seen = max(0, min(256, edge - span * 256)) * wide / 256
            at = 12 * span + row  # spans one after the other, and rows in groups of four
            kind = "done" if at < 16 else "now" if at < 20 else "later"
            yield f'<rect class="never" x="{x}" y="{y}" width="{wide}" height="{high}"/>'
            if seen:
                yield f'<rect class="{kind}" x="{x}" y="{y}" width="{seen:g}" height="{high}"/>'
    for row in range(12):
        yield f'<text x="4" y="{y0 + row * high + 12}">row {row}, at {(row + 21) * 24 - 1}</text>'
        yield f'<rect class="done" x="560" y="{y0 + row * high}" width="34" height="{high}"/>'
        yield f'<rect class="done" x="594" y="{y0 + row * high}" width="34" height="{high}"/>'
        yield f'<rect class="done" x="628" y="{y0 + row * high}" width="120" height="{high}"/>'
    for x, word in ((577, "most"), (611, "sum"), (688, "sums of values")):
        yield f'<text class="mid" x="{x}" y="36">{word}</text>'


def example() -> Iterator[str]:
    """Two spans' records of one row, by numbers, and how they become one."""
    total = max(record(scores)[0] for scores in EXAMPLE)
    whole = 0.0
    for i, scores in enumerate(EXAMPLE):
        y = 278 + 40 * i
        most, weights = record(scores)
        whole += sum(weights) * 2.0 ** (most - total)
        yield f'<text x="4" y="{y}">span {i}: scores {"  ".join(f"{s:4.1f}" for s in scores)}</text>'
        told = "  ".join(f"{w:.2f}" for w in weights)
        yield f'<text x="320" y="{y}">most {most}, weights {told}, sum {sum(weights):.2f}</text>'
        base = f"to the base {total}: times 2^({most} - {total}) = {2.0 ** (most - total):g}"
        yield f'<text x="320" y="{y + 16}">{base}</text>'
    yield f'<text x="320" y="366">together: most {total}, sum {whole:.2f}</text>'


def picture() -> str:
    """The tiles, and the example, as an SVG."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 380"><style>{STYLE}</style>'
    texts = [
        '<text x="4" y="16">Scores of 12 rows. Orange: the only ones in memory now. Blue: done and gone.'
        " Dashed: seen by nobody.</text>",
        '<text x="4" y="258">One row, two spans of four keys. Weights are 2^(score - most), and most is a'
        " whole number.</text>",
    ]
    return "\n".join([head, *texts, *tiles(), *example(), "</svg>\n"])


def main() -> None:
    """Print the tables, and draw."""
    parser = parser_of(__doc__)
    parser.add_argument("--speed", action="store_true", help="compile with other numbers of keys a span")
    parser.add_argument("--mine", type=Path, help="a learner's folder, whose kernel is measured")
    arguments = parser.parse_args()
    if arguments.svg:
        arguments.svg.write_text(picture(), encoding="utf-8")
    lines = speed_table(arguments.mine) if arguments.speed or arguments.mine else memory_table()
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
