"""Chapter 2.4: what a product of 1, 4 and 16 rows reads of a matrix, counted by metalsim. --svg draws.

python book/experiments/quantized_matmul_gpu.py [--svg book/docs/img/quantized_matmul_gpu.svg]
python book/experiments/quantized_matmul_gpu.py --mine my_llm
python book/experiments/quantized_matmul_gpu.py --mistake every-lane-writes
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from command_line import parser_of

from book.course.manifest import read_manifest
from book.course.overlay import VARIABLE
from book.course.workbook import Workbook
from tiny_llm.metalsim.build import why_not
from tiny_llm.metalsim.faults import KernelFault
from tiny_llm.metalsim.run import Traffic, watch
from tiny_llm.ops.backend import use
from tiny_llm.ops.metal import kernel

OUTPUTS, INPUTS, GROUP = 64, 896, 64  # 64 of the outputs of Qwen2-0.5B's matrices; all are alike
MATRIX = ("packed", "scales", "biases")
CHUNKS, LANES = INPUTS // 32, 8
STYLE = (
    "svg{background:#fff}rect{fill:#f3f3f3;stroke:#999}.one{fill:#f2a65a}.word{fill:#e3ecf5}"
    "path{stroke:#e6862b;fill:none}"
    "text{font:11px monospace;fill:#333;text-anchor:middle}.left{text-anchor:start}"
)


def traffic(rows: int, at_once: int) -> Traffic:
    """What one product of so many rows does, ``at_once`` of them a block."""
    weight = mx.random.normal((OUTPUTS, INPUTS), key=mx.random.key(0)).astype(mx.bfloat16)
    x = mx.random.normal((rows, INPUTS), key=mx.random.key(1)).astype(mx.bfloat16)
    blocks = rows // at_once
    with watch() as seen:
        kernel("quantized_matmul")(
            inputs=[x, *mx.quantize(weight, GROUP, 4), x, rows, OUTPUTS],
            template=[
                *(("T", x.dtype), ("S", x.dtype), ("I", INPUTS), ("BITS", 4), ("GROUP", GROUP)),
                *(("BIAS", False), ("R", at_once)),
            ],
            grid=(32, OUTPUTS // 8, blocks),
            threadgroup=(32, 2, min(4, blocks)),
            output_shapes=[(rows, OUTPUTS)],
            output_dtypes=[x.dtype],
        )
    return seen[0][1]


def table() -> Iterator[str]:
    """Bytes of the matrix, as threads ask for them and as threadgroups do."""
    yield "rows  at once   KB read  of these from memory  KB read a row"
    for rows, at_once in ((1, 1), (4, 1), (4, 2), (4, 4), (16, 1), (16, 4)):
        counted = traffic(rows, at_once)
        read, fetched = (sum(part[name] for name in MATRIX) / 1e3 for part in (counted.read, counted.fetched))
        yield f"{rows:>4} {at_once:>8} {read:>9.1f} {fetched:>21.1f} {read / rows:>14.1f}"


def roundings() -> str:
    """How often a norm with one rounding less gives another number."""
    x, weight = (
        mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(((512, 128), (128,)))
    )
    weight = weight.astype(mx.bfloat16)
    normed = x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    twice, once = normed.astype(mx.bfloat16) * weight, (normed * weight).astype(mx.bfloat16)
    return f"one rounding less: {mx.mean(twice != once).item():.0%} of a head's numbers are others"


def picture() -> str:
    """Which lane of a simdgroup takes which chunk of which output, and how lanes add up, as an SVG."""
    lines = []
    for output in range(8):
        y = 44 + 22 * output
        lines.append(f'<text class="left" x="4" y="{y + 15}">output {output}</text>')
        for chunk in range(CHUNKS):
            lane, x = output % 4 * LANES + chunk % LANES, 78 + 24 * chunk
            kind = "one" if lane == 0 else "word" if chunk // LANES % 2 else "plain"
            lines.append(f'<rect class="{kind}" x="{x}" y="{y}" width="24" height="22"/>')
            lines.append(f'<text x="{x + 12}" y="{y + 15}">{lane}</text>')
    for step in range(4):
        y = 264 + 46 * step
        words = "sums of lanes 0 to 7" if step == 0 else f"and of lane xor {2 ** (step - 1)}"
        lines.append(f'<text class="left" x="4" y="{y + 15}">{words}</text>')
        for lane in range(LANES):
            x, low = 190 + 68 * lane, lane >> step << step
            held = f"{low}-{low + 2**step - 1}" if step else str(lane)
            kind = "one" if lane == 0 and step == 3 else "plain"
            lines.append(f'<rect class="{kind}" x="{x}" y="{y}" width="56" height="22"/>')
            lines.append(f'<text x="{x + 28}" y="{y + 15}">{held}</text>')
            if step < 3:
                for to in (lane, lane ^ 2**step):
                    lines.append(f'<path d="M{x + 28} {y + 22}L{218 + 68 * to} {y + 46}"/>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 432"><style>{STYLE}</style>'
    texts = [
        '<text class="left" x="4" y="16">8 outputs of 896 inputs: 28 chunks of 32 weights, and the lane'
        " that takes each. Lane 0's are orange.</text>",
        '<text class="left" x="78" y="36">chunk 0, 1, 2, ... 27</text>',
        '<text class="left" x="4" y="246">Then eight lanes add up their parts in three steps;'
        " each holds the whole, and lane 0 stores it.</text>",
    ]
    return "\n".join([head, *texts, *lines, "</svg>\n"])


def by_code_of(folder: Path) -> str:
    """What this prints with a learner's code, which must be there before the package is loaded."""
    environment = {**os.environ, VARIABLE: str(folder.resolve())}
    command = [sys.executable, sys.argv[0]]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    """Print the tables, and draw."""
    parser = parser_of(__doc__)
    parser.add_argument("--mine", type=Path, help="a learner's folder, whose kernel is run")
    parser.add_argument("--mistake", help="one of those that course break 2.4 lists, to be run instead")
    arguments = parser.parse_args()
    if arguments.mine:
        print(by_code_of(arguments.mine), end="")
        return
    if arguments.mistake:
        (mutant,) = (it for it in read_manifest()["2.4"].mutants if it.name == arguments.mistake)
        with tempfile.TemporaryDirectory() as folder:
            Workbook(Path(folder)).add_mutant(mutant)
            print(by_code_of(Path(folder)), end="")
        return
    if arguments.svg:
        arguments.svg.write_text(picture(), encoding="utf-8")
    if reason := why_not():
        sys.exit(reason)
    try:
        with use("metalsim"):
            print("\n".join(table()))
    except KernelFault as fault:
        print(textwrap.fill(str(fault), 110, break_long_words=False, break_on_hyphens=False))
    else:
        print(f"\n{roundings()}")


if __name__ == "__main__":
    main()
