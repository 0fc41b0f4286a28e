"""Chapter 2.2: ways to be fooled by a clock. Prints two tables; --svg draws.

python book/experiments/measuring.py [--svg book/docs/img/measuring.svg]
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import mlx.core as mx
from command_line import parser_of

from tiny_llm.ops.linear import linear, pack
from tiny_llm.planning.rounds import Trial, interleave, seconds_of

ROUNDS = 20
SIDES = ("A", "B")


def lazy_table() -> str:
    """One product of two matrices, timed in three ways."""
    x, packed = mx.ones((256, 1024)), pack(mx.ones((1024, 1024)), exact=True)
    began = time.perf_counter()
    y = linear(x, packed)
    built = time.perf_counter() - began
    first = seconds_of(lambda: y)
    later = statistics.median(seconds_of(lambda: linear(x, packed)) for _ in range(ROUNDS))
    again = seconds_of(lambda: y)
    rows = {
        "without evaluating it": built,
        "evaluated, the first time": first,
        f"evaluated anew, the median of {ROUNDS}": later,
        "the first one, evaluated once more": again,
    }
    lines = [f"{'a product of 0.54 billion operations':<38}      ms"]
    lines += [f"{name:<38}{1e3 * seconds:>8.3f}" for name, seconds in rows.items()]
    return "\n".join(lines)


def machine() -> Iterator[float]:
    """Seconds of one piece of work, call after call: slower as the machine warms, interrupted at times."""
    chance = random.Random(5)
    for call in range(2 * ROUNDS):
        noise = 1 + 0.02 * chance.random()
        interrupted = 3.0 if chance.random() < 0.1 else 1.0
        yield 0.100 * (1 + 0.2 * call / (2 * ROUNDS)) * noise * interrupted


def turns_of(blocks: bool) -> Mapping[str, Sequence[tuple[int, float]]]:
    """Two sides that do the very same, in blocks or in turns: the number of each call, and its seconds."""
    work, calls = machine(), dict[str, list[tuple[int, float]]]((side, []) for side in SIDES)

    def run(side: str) -> Callable[[], float]:
        def call() -> float:
            number = sum(map(len, calls.values()))
            calls[side].append((number, next(work)))
            return calls[side][-1][1]

        return call

    trials = [Trial((side,), 1.0, run(side)) for side in SIDES]
    for part in [[trial] for trial in trials] if blocks else [trials]:
        interleave(part, ROUNDS, pause=0)
    return calls


def fooled_table() -> str:
    """How much slower B looks than A, which is the same."""
    lines = ["the same work twice     B looks slower, by means    by medians"]
    for name, blocks in (("first A, then B", True), ("in turns", False)):
        seconds = {side: [s for _, s in calls] for side, calls in turns_of(blocks).items()}
        apart = [pick(seconds["B"]) / pick(seconds["A"]) - 1 for pick in (statistics.mean, statistics.median)]
        lines.append(f"{name:<23} {apart[0]:>25.1%} {apart[1]:>13.1%}")
    return "\n".join(lines)


def picture() -> str:
    """Each call of both ways as a dot, as an SVG; interruptions lie at the top."""

    def height(seconds: float) -> float:
        return max(44.0, 200 - 4500 * (seconds - 0.098))

    parts = list[str]()
    for at, (name, blocks) in enumerate((("first A, then B", True), ("in turns", False))):
        left, medians = 30 + 370 * at, list[str]()
        parts.append(f'<path d="M{left} 208H{left + 340}"/>')
        for side, calls in turns_of(blocks).items():
            middle = statistics.median(s for _, s in calls)
            medians.append(f'<tspan class="{side}">{side} {1e3 * middle:.1f} ms</tspan>')
            first, last = (left + 8.5 * calls[i][0] for i in (0, -1))
            parts.append(f'<path class="{side}" d="M{first:.0f} {height(middle):.1f}H{last:.0f}"/>')
            for number, spent in calls:
                x, y = left + 8.5 * number, height(spent)
                parts.append(f'<circle class="{side}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        parts.append(f'<text x="{left}" y="18">{name}; medians: {", ".join(medians)}</text>')
    parts.append('<text x="30" y="228">calls, one after the other; higher is slower</text>')
    style = (
        "svg{background:#fff}path{stroke:#888;fill:none}path.A{stroke:#e6862b;stroke-width:2}"
        "path.B{stroke:#35618f;stroke-width:2}circle.A{fill:#e6862b}circle.B{fill:#35618f}"
        "text{font:12px monospace;fill:#333}tspan.A{fill:#b5610f}tspan.B{fill:#35618f}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 240"><style>{style}</style>'
    return "\n".join([head, *parts, "</svg>\n"])


def main() -> None:
    """Print the tables, and draw."""
    arguments = parser_of(__doc__).parse_args()
    print(lazy_table(), fooled_table(), sep="\n\n")
    if arguments.svg:
        arguments.svg.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
