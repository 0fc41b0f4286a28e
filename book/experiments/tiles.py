"""Chapter 2.8: what tiles fetch of a matrix, which grids are too small, whose bits a row gets. --svg draws.

python book/experiments/tiles.py [--mistakes] [--svg book/docs/img/tiles.svg]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from math import prod

import mlx.core as mx
from by_mistakes import show, told_with

from tiny_llm.data import QuantizedTensor
from tiny_llm.metalsim.build import why_not
from tiny_llm.metalsim.faults import KernelFault
from tiny_llm.metalsim.run import Traffic, watch
from tiny_llm.ops import quantized_matmul_metal as matmul
from tiny_llm.ops.backend import use

OUTPUTS, INPUTS, GROUP = 64, 896, 64  # 64 of the outputs of Qwen2-0.5B's matrices; all are alike
MATRIX = ("packed", "scales", "biases")
GRIDS = {"keys or values": 128, "queries": 896, "down": 896, "gate and up": 9728, "head": 151_936}  # outputs
SHOWN = (
    "inputs-for-each-matrix",
    "an-eighth-each",
    "all-by-the-first",
    "added-one-by-one",
    "far-ones-first",
    "room-used-too-soon",
)
PARTS = ("#f3c795", "#a9c8e6", "#b5d8b0", "#e2b6d3", "#d9cb9a", "#a8d5d5", "#eeb3ae", "#c9c3ea")


def traffic(rows: int) -> Traffic:
    """What such a product does, by blocks of rows or by tiles."""
    weight = mx.random.normal((OUTPUTS, INPUTS), key=mx.random.key(0)).astype(mx.bfloat16)
    x = mx.random.normal((rows, INPUTS), key=mx.random.key(1)).astype(mx.bfloat16)
    with watch() as seen:
        matmul._run("", x, [QuantizedTensor(*mx.quantize(weight, GROUP, 4), GROUP, 4)], [None], rows > 4)
    return seen[0][1]


def fetched() -> Iterator[str]:
    """By rows: the height of a tile or block, what of it is idle, and bytes of the matrix."""
    whole = OUTPUTS * INPUTS * 4.5 / 8
    yield "rows  together  idle   KB fetched   foretold   KB a row"
    for rows in (1, 4, 5, 8, 16, 32, 40, 64):
        counted = traffic(rows)
        together = 8 * dict(matmul._tiles(rows, [OUTPUTS], 1)[1])["M"] if rows > 4 else rows
        times = -(-rows // together)
        got = sum(counted.fetched[part] for part in MATRIX)
        idle = 1 - rows / (times * together)
        yield (
            f"{rows:>4} {together:>9} {idle:>5.0%} {got / 1e3:>12.1f} {times * whole / 1e3:>10.1f} "
            f"{got / 1e3 / rows:>10.1f}"
        )


def grids() -> Iterator[str]:
    """How many simdgroups a prompt of 32 tokens keeps busy, with each tile's inputs whole or in parts."""
    yield f"{'32 tokens, one layer':<20}  outputs   tiles   simdgroups, if one each   as it is"
    for name, outputs in GRIDS.items():
        _, _, grid, group = matmul._tiles(32, [outputs], 1)
        tiles = prod(grid) // prod(group)
        yield f"{name:<20} {outputs:>8,} {tiles:>7,} {tiles:>25,} {tiles * group[0] // 32:>10,}"


def table() -> str:
    """Both."""
    with use("metalsim"):
        return "\n".join([*fetched(), "", *grids()])


def story() -> str:
    """A product of 16 rows, in a line: is it right, whose bits does a row have, and what was done for it?"""
    x = mx.random.normal((16, 352), key=mx.random.key(0))
    dense = mx.random.normal((33, 352), key=mx.random.key(5))
    weight = QuantizedTensor(*mx.quantize(dense, 32, 4), 32, 4)
    with use("metalsim"):
        try:
            with watch() as seen:
                (got,) = matmul._run("", x, [weight], [None], tiles=True)
        except KernelFault as fault:
            return f"   {str(fault).split(': ')[1]}"
        (alone,) = matmul._run("", x, [weight], [None], tiles=False)
    expected = x @ mx.dequantize(weight.packed, weight.scales, weight.biases, group_size=32, bits=4).T
    right = "right" if mx.allclose(got, expected, atol=1e-4).item() else "wrong"
    counted = seen[0][1]
    other = mx.mean(got != alone).item()
    return f"{right:>8} {other:>11.0%} {counted.read['x'] / 1e3:>12.1f} {counted.barriers // 512:>9}"


def mistakes() -> str:
    """The story with mistakes of this chapter, each in a process of its own."""
    lines = [f"{'mistake':<23} answer  other bits  KB of inputs  barriers"]
    lines += [f"{name:<22} {told}" for name, told in told_with(__file__, "2.8", SHOWN)]
    return "\n".join(lines)


def output() -> Iterator[str]:
    """The product of 40 rows and 70 outputs as tiles, of which some are not full."""
    for down in range(2):
        for across in range(3):
            x, y = 4 + 96 * across, 44 + 96 * down
            yield f'<rect class="none" x="{x}" y="{y}" width="96" height="96"/>'
            wide, high = min(96, 3 * (70 - 32 * across)), min(96, 3 * (40 - 32 * down))
            yield f'<rect class="one" x="{x}" y="{y}" width="{wide}" height="{high}"/>'
            lines = " ".join(f"M{x + 24 * i} {y}v96M{x} {y + 24 * i}h96" for i in range(1, 4))
            yield f'<path class="thin" d="{lines}"/>'
            yield f'<rect class="edge" x="{x}" y="{y}" width="96" height="96"/>'


def inputs() -> Iterator[str]:
    """The 28 chunks of a tile's 896 inputs, and which simdgroup takes each; then three rounds of sums."""
    for chunk in range(28):
        x, y = 330 + 52 * (chunk % 8), 44 + 26 * (chunk // 8)
        yield f'<rect fill="{PARTS[chunk % 8]}" x="{x}" y="{y}" width="52" height="26"/>'
        yield f'<text x="{x + 26}" y="{y + 17}">{chunk}</text>'
    for step in range(4):
        y = 168 + 42 * step
        for part in range(0, 8, 2**step):
            x = 330 + 52 * part + 26 * (2**step - 1)
            held = f"{part}-{part + 2**step - 1}" if step else str(part)
            yield f'<rect fill="{PARTS[part]}" x="{x}" y="{y}" width="52" height="22"/>'
            yield f'<text x="{x + 26}" y="{y + 15}">{held}</text>'
            if step < 3:
                to = 330 + 52 * (part >> step + 1 << step + 1) + 26 * (2 ** (step + 1) - 1)
                yield f'<path d="M{x + 26} {y + 22}L{to + 26} {y + 42}"/>'


def picture() -> str:
    """A product's tiles, and one tile's inputs, as an SVG."""
    style = (
        "svg{background:#fff}rect{stroke:#999}.none{fill:#eee;stroke:none}.one{fill:#f3c795;stroke:none}"
        ".edge{fill:none;stroke:#333;stroke-width:2}.thin{stroke:#fff}path{stroke:#555;fill:none}"
        "text{font:11px monospace;fill:#333;text-anchor:middle}.left{text-anchor:start}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 330"><style>{style}</style>'
    texts = [
        '<text class="left" x="4" y="16">40 rows of 70 outputs: six tiles</text>',
        '<text class="left" x="4" y="32">of 32 x 32. Gray is not there.</text>',
        '<text class="left" x="330" y="16">One tile: its 896 inputs are 28 chunks of 32.</text>',
        '<text class="left" x="330" y="32">Eight simdgroups take them in turns,</text>',
        '<text class="left" x="4" y="266">Each small square is a matrix of 8 x 8.</text>',
        '<text class="left" x="4" y="282">A weight meets all rows of its tile.</text>',
        '<text class="left" x="330" y="160">and their sums become one in three rounds.</text>',
    ]
    return "\n".join([head, *texts, *output(), *inputs(), "</svg>\n"])


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    show(__doc__, table, picture, mistakes, story)
