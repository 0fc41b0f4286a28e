"""Chapter 0.3: what steps of Qwen2-0.5B have to do, and where that puts them under a roof. --svg draws.

python book/experiments/cost.py [--svg book/docs/img/cost.svg]
"""

from __future__ import annotations

from math import log10
from typing import NamedTuple

from command_line import parser_of

from tiny_llm.config import Quantization
from tiny_llm.models.cost import Work, least_seconds, step_of
from tiny_llm.models.footprint import kv_token_bytes, weights_bytes
from tiny_llm.planning.memory import find_config

READ, PEAK = 35e9, 700e9  # a machine to draw: bytes and operations a second
CONFIG = find_config("qwen2-0.5b")
WEIGHTS = weights_bytes(CONFIG, 2, 4, Quantization(4, 64))
KV = kv_token_bytes(CONFIG, 2)


class Case(NamedTuple):
    """A step to look at."""

    name: str
    start: int
    tokens: int
    sequences: int = 1

    @property
    def work(self) -> Work:
        """Both parts of the step together."""
        step = step_of(CONFIG, WEIGHTS, KV, start=self.start, tokens=self.tokens, sequences=self.sequences)
        return Work(step.matrices.flops + step.attention.flops, step.matrices.bytes + step.attention.bytes)


CASES = (
    Case("decode, 16 tokens before", 16, 1),
    Case("decode, 4,096 before", 4096, 1),
    Case("decode, 16 sequences, 256", 256, 1, 16),
    Case("decode, 64 sequences, 256", 256, 1, 64),
    Case("prefill of 16", 0, 16),
    Case("prefill of 512", 0, 512),
)

LABELS = (
    (8, 14, "start"),
    (10, 4, "start"),
    (4, 32, "start"),
    (4, 18, "start"),
    (-4, -12, "middle"),
    (0, -12, "middle"),
)


def table() -> str:
    """A line a step."""
    lines = [f"{'a step':<26}{'GFLOP':>9}{'MB':>8}{'FLOP/byte':>11}{'least ms':>10}  bound by"]
    for case in CASES:
        work = case.work
        ms = 1e3 * least_seconds(work, PEAK, READ)
        bound = "bytes" if work.intensity < PEAK / READ else "operations"
        row = f"{case.name:<26}{work.flops / 1e9:>9.2f}{work.bytes / 1e6:>8.0f}{work.intensity:>11.1f}"
        lines.append(f"{row}{ms:>10.1f}  {bound}")
    return "\n".join(lines)


def picture() -> str:
    """The roof, on logarithmic axes, and each step under it."""
    left, top, wide, high = 70, 24, 640, 230

    def at(intensity: float, rate: float) -> tuple[float, float]:
        return left + wide * (log10(intensity) + 0.1) / 3.6, top + high * (12.1 - log10(rate)) / 1.9

    corner = PEAK / READ
    points = [at(1, READ), at(corner, PEAK), at(2500, PEAK)]
    roof = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    drawn = [f'<path class="axis" d="M{left} {top}V{top + high}H{left + wide}"/>']
    for intensity in (1, 10, 100, 1000):
        x = at(intensity, READ)[0]
        drawn.append(f'<text class="x" x="{x:.1f}" y="{top + high + 16}">{intensity:,}</text>')
    for rate in (20, 100, 500):
        y = at(1, rate * 1e9)[1] + 4
        drawn.append(f'<text class="y" x="{left - 6}" y="{y:.1f}">{rate}</text>')
    drawn.append(f'<text class="x" x="{left + wide / 2}" y="{top + high + 34}">operations a byte</text>')
    drawn.append(f'<text x="10" y="{top - 6}">GFLOP/s</text>')
    drawn.append(f'<path class="roof" d="M{roof}"/>')
    x, y = at(8, READ * 8)
    drawn.append(
        f'<text class="slope" x="{x - 116:.1f}" y="{y - 4:.1f}">{READ / 1e9:.0f} GB/s of memory</text>'
    )
    x, y = at(corner, PEAK)
    drawn.append(f'<text class="slope" x="{x + 120:.1f}" y="{y - 9:.1f}">{PEAK / 1e9:.0f} GFLOP/s</text>')
    for case, (right, down, anchor) in zip(CASES, LABELS, strict=True):
        work = case.work
        x, y = at(work.intensity, work.flops / least_seconds(work, PEAK, READ))
        drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        label = f'<text x="{x + right:.1f}" y="{y + down:.1f}" text-anchor="{anchor}">'
        drawn.append(f"{label}{case.name}</text>")
    style = (
        "svg{background:#fff}text{font:11px sans-serif;fill:#333}path{fill:none}.axis{stroke:#555}"
        ".x{text-anchor:middle}.y{text-anchor:end}.roof{stroke:#3b7dd8;stroke-width:2.5}circle{fill:#e6862b}"
        ".slope{fill:#3b7dd8}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 296"><style>{style}</style>'
    return "\n".join([head, *drawn, "</svg>\n"])


def main() -> None:
    """Print the table, and draw."""
    arguments = parser_of(__doc__).parse_args()
    print(table())
    if arguments.svg:
        arguments.svg.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
