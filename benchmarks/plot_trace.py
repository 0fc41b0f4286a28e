"""Draw a trace of ``generate --file ... --trace trace.json`` as an SVG: who was computed when.

    python benchmarks/plot_trace.py trace.json timeline.svg

A row a sequence, time to the right; waiting, chunks of the prompt, decodes and time spent swapped out are
colours of their own. At most ``--sequences`` rows are drawn, the first to arrive.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

COLOURS: Mapping[str, str] = {
    "waiting": "#d9d9d9",
    "prefill": "#e6862b",
    "decode": "#3b78b5",
    "swapped": "#8a5aa8",
}
WIDTH, LEFT, ROW, TOP, BOTTOM = 1000, 110, 14, 46, 34
JOIN_US = 50.0  # decodes no further apart are drawn as one bar
Event = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Bar:
    """What a sequence did, from when to when, in microseconds."""

    name: str
    track: int
    began: float
    ended: float


def bars_of(events: Iterable[Event]) -> list[Bar]:
    """The sequences' bars, in order of time; what follows at once on its like is one with it."""
    last: dict[int, Bar] = {}
    done: list[Bar] = []
    sequences = [event for event in events if event.get("name") in COLOURS]
    for event in sorted(sequences, key=lambda event: float(str(event["ts"]))):
        began = float(str(event["ts"]))
        bar = Bar(str(event["name"]), int(str(event["tid"])), began, began + float(str(event["dur"])))
        before = last.get(bar.track)
        if before and before.name == bar.name == "decode" and bar.began - before.ended < JOIN_US:
            last[bar.track] = Bar(bar.name, bar.track, before.began, bar.ended)
            continue
        if before:
            done.append(before)
        last[bar.track] = bar
    return sorted([*done, *last.values()], key=lambda bar: (bar.began, bar.track))


def draw(bars: Sequence[Bar], most: int) -> str:
    """An SVG of the first ``most`` sequences. Raises ValueError if there are no bars."""
    if not bars:
        raise ValueError("the trace has no sequences; was it written by `generate --file ... --trace`?")
    tracks = list(dict.fromkeys(bar.track for bar in bars))[:most]
    rows = {track: number for number, track in enumerate(tracks)}
    began, ended = bars[0].began, max(bar.ended for bar in bars)
    scale = (WIDTH - LEFT - 10) / max(1.0, ended - began)
    height = TOP + ROW * len(rows) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        *_legend(),
        *(_label(track, number) for track, number in rows.items()),
        *(_bar(bar, rows[bar.track], began, scale) for bar in bars if bar.track in rows),
        *_axis(ended - began, scale, TOP + ROW * len(rows)),
        "</svg>",
    ]
    return "\n".join(parts)


def _legend() -> Iterable[str]:
    for number, (name, colour) in enumerate(COLOURS.items()):
        x = LEFT + 110 * number
        yield f'<rect x="{x}" y="14" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{x + 18}" y="24">{escape(name)}</text>'


def _label(track: int, number: int) -> str:
    return f'<text x="{LEFT - 8}" y="{TOP + ROW * number + 10}" text-anchor="end">sequence {track}</text>'


def _bar(bar: Bar, number: int, began: float, scale: float) -> str:
    x, width = LEFT + (bar.began - began) * scale, max(0.4, (bar.ended - bar.began) * scale)
    title = f"<title>{escape(bar.name)}, {(bar.ended - bar.began) / 1e3:.1f} ms</title>"
    shape = f'x="{x:.2f}" y="{TOP + ROW * number}" width="{width:.2f}" height="{ROW - 3}"'
    return f'<rect {shape} fill="{COLOURS[bar.name]}">{title}</rect>'


def _axis(length: float, scale: float, y: int) -> Iterable[str]:
    """Five marks, in seconds."""
    for mark in range(6):
        x = LEFT + length * scale * mark / 5
        yield f'<path d="M{x:.1f} {TOP - 4}V{y + 4}" stroke="#999" stroke-width="0.5"/>'
        yield f'<text x="{x:.1f}" y="{y + 18}" text-anchor="middle">{length * mark / 5e6:.2f} s</text>'


def main() -> None:
    """Read a trace, write a picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--sequences", type=int, default=64, help="rows at most")
    options = parser.parse_args()
    try:
        events = json.loads(options.trace.read_text(encoding="utf-8"))["traceEvents"]
        options.picture.write_text(draw(bars_of(events), options.sequences), encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        parser.error(f"{options.trace}: {error}")
    print(f"{options.picture}: {len({event['tid'] for event in events if event.get('ph') == 'X'})} tracks")


if __name__ == "__main__":
    main()
