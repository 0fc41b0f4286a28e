"""Chapter 3.2: what decodes read of keys and values, and which bits a row gets, by metalsim. --svg draws.

python book/experiments/paged_attention.py [--mistakes] [--svg book/docs/img/paged_attention.svg]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
from by_mistakes import show, told_with

from tiny_llm.data import Pages
from tiny_llm.metalsim.build import why_not
from tiny_llm.metalsim.run import watch
from tiny_llm.ops import paged_attention as attention
from tiny_llm.ops.backend import use
from tiny_llm.ops.kv_pool import Pool
from tiny_llm.ops.work_lists import UNBOUNDED, WorkLists

SIZE, NAMES = 16, ("keys", "values")
BATCHES = ((17, 17, 17, 17), (10, 20, 40, 128), (10, 20, 40, 500))
SHOWN = (
    "whole-blocks-read",
    "before-the-window-read",
    "turns-from-the-window",
    "last-span-first",
    "largest-first",
)
STYLE = (
    "svg{background:#fff}rect{stroke:#999;fill:#fff}.a{fill:#f3c795}.b{fill:#a9c8e6}.c{fill:#b5d8b0}"
    ".none{fill:#eee}path{stroke:#555;fill:none}"
    "text{font:12px monospace;fill:#333;text-anchor:middle}.left{text-anchor:start}"
)
Step = tuple[mx.array, Pool, WorkLists]


def step(lens: Sequence[int], heads: int, shared: int, dim: int, dtype: mx.Dtype) -> Step:
    """The last row of each sequence, whose blocks lie anywhere in a pool of numbers."""
    blocks = [-(-end // SIZE) for end in lens]
    order = np.random.default_rng(1).permutation(sum(blocks))
    tables = np.zeros((len(lens), max(blocks)), np.int32)
    for b, count in enumerate(blocks):
        tables[b, :count] = order[sum(blocks[:b]) :][:count]
    numbers = ([0] * len(lens), tables, range(len(lens) + 1), lens)
    pages = Pages(*(mx.array(np.array(one, np.int32)) for one in numbers))
    shapes = (len(lens), heads, dim), (sum(blocks), shared, dim, SIZE), (sum(blocks), shared, SIZE, dim)
    q, keys, values = (
        mx.random.normal(shape, key=mx.random.key(i)).astype(dtype) for i, shape in enumerate(shapes)
    )
    return q, (keys, values), WorkLists(pages)


def read(lens: Sequence[int]) -> int:
    """Bytes that the kernel asks for of the keys and values of one of Qwen2-0.5B's two key heads."""
    q, pool, work = step(lens, 7, 1, 64, mx.bfloat16)
    with watch() as seen:
        mx.eval(attention._rows(q, pool, work, 0.125)[0])
    return sum(traffic.read.get(name, 0) for _, traffic in seen for name in NAMES)


def table() -> str:
    """What ways to find keys and values read and write of them."""
    token = 2 * 64 * 2  # key and value, numbers, bytes
    lines = [f"{'lengths':<20} padded, KB   gathered, KB   by table, KB   foretold, KB"]
    with use("metalsim"):
        for lens in BATCHES:
            whole = sum(-(-end // SIZE) * SIZE for end in lens)
            sizes = (len(lens) * max(lens), 3 * whole, read(lens) / token, sum(lens))
            told = "".join(
                f"{tokens * token / 1e3:>{width}.1f}"
                for tokens, width in zip(sizes, (9, 15, 15, 15), strict=True)
            )
            lines.append(f"{', '.join(map(str, lens)):<20} {told}")
    return "\n".join(lines)


def story() -> str:
    """Two rows without a window and with two of them, in a line: errors, bits, and what was read."""
    errors, others, tokens = zip(*map(by_window, (UNBOUNDED, 150, 40)), strict=True)
    right = "right" if max(errors) < 1e-5 else "wrong"
    return f"{right:>7} {sum(others) / 3:>11.0%} {sum(tokens):>10}"


def by_window(window: int) -> tuple[float, float, int]:
    """The largest error, the share of numbers that tiles give other bits, tokens whose keys were read."""
    q, pool, work = step((100, 500), 4, 2, 16, mx.float32)
    with use("metalsim"):
        with watch() as seen:
            rows = attention._rows(q, pool, work, 0.25, window)[0]
        tiles = attention._tiles(q, pool, work, 0.25, window)[0]
    tables, lens = (np.array(one) for one in (work.pages.block_tables, work.pages.context_lens))
    errors = []
    for b, end in enumerate(lens):
        keys, values = (
            np.array(one)[tables[b]].transpose(0, *axes).reshape(-1, 2, 16)[max(0, end - window) : end]
            for one, axes in zip(pool, ((3, 1, 2), (2, 1, 3)), strict=True)
        )
        scores = np.einsum("kgd,skd->kgs", np.array(q[b]).reshape(2, 2, 16), keys) * 0.25
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = np.einsum("kgs,skd->kgd", weights / weights.sum(-1, keepdims=True), values)
        errors.append(np.abs(np.array(rows[b]).reshape(2, 2, 16) - expected).max() / np.abs(expected).max())
    tokens = sum(traffic.read.get("keys", 0) for _, traffic in seen) // (2 * 16 * 4)
    return max(errors), mx.mean(rows != tiles).item(), tokens


def mistakes() -> str:
    """The story with mistakes of this chapter, each in a process of its own."""
    lines = [f"{'mistake':<24} answer  other bits  keys read"]
    lines += [f"{name:<23} {told}" for name, told in told_with(__file__, "3.2", SHOWN)]
    return "\n".join(lines)


DRAWN = (("a", (5, 2, 9, 0, 7, 12, 3, 11, 14, 6), 3), ("b", (8, 1), 9), ("c", (13, 4, 10), 16))


def boxes(
    left: float, y: float, kinds: Sequence[str], words: Sequence[object], wide: int = 40
) -> Iterator[str]:
    """A row of boxes, each of a kind and with a word in it."""
    for i, (kind, word) in enumerate(zip(kinds, words, strict=True)):
        yield f'<rect class="{kind}" x="{left + i * wide}" y="{y}" width="{wide}" height="26"/>'
        yield f'<text x="{left + i * wide + wide / 2}" y="{y + 17}">{word}</text>'


def picture() -> str:
    """A pool, three tables, and how a row of the longest goes through its blocks: spans of 4, two turns."""
    owner = {block: name for name, blocks, _ in DRAWN for block in blocks}
    parts = ['<text class="left" x="4" y="16">A pool of 16 blocks. Whose is each?</text>']
    parts += boxes(4, 26, [owner.get(block, "none") for block in range(16)], range(16), 46)
    parts.append(
        '<text class="left" x="4" y="84">The tables: the blocks of each sequence, by position.</text>'
    )
    for row, (name, blocks, last) in enumerate(DRAWN):
        parts += boxes(4, 94 + 34 * row, [name] * len(blocks), blocks)
        words = f"{last} of 16 slots of the last block hold a token"
        parts.append(f'<text class="left" x="{14 + 40 * len(blocks)}" y="{111 + 34 * row}">{words}</text>')
    parts.append(
        '<text class="left" x="4" y="226">A row of the first sequence. Spans are cut by position, and</text>'
    )
    parts.append('<text class="left" x="4" y="242">the blocks of each go to two simdgroups in turns.</text>')
    name, blocks, _ = DRAWN[0]
    for i, block in enumerate(blocks):
        x = 4 + 40 * i + 22 * (i // 4)
        parts += boxes(x, 272, [name], [block])
        parts.append(f'<text x="{x + 20}" y="266">{i % 4 % 2}</text>')
    for span, (begin, count) in enumerate(((4, 4), (186, 4), (368, 2))):
        middle = begin + 20 * count
        parts.append(f'<path d="M{begin} 302v8h{40 * count}v-8M{middle} 310v14"/>')
        parts += boxes(middle - 55, 324, ["plain"], [f"part of span {span}"], 110)
        parts.append(f'<path d="M{middle} 350V{366 if span < 2 else 384}"/>')
    parts.append('<path d="M84 366H266V384M266 384h122"/>')
    parts += boxes(388, 384, ["plain"], ["the row's result"], 130)
    parts.append('<text class="left" x="4" y="402">0, then 1, then 2: the order is the position\'s.</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 424"><style>{STYLE}</style>'
    return "\n".join([head, *parts, "</svg>\n"])


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    show(__doc__, table, picture, mistakes, story)
