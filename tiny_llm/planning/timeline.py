"""Owns the picture of a trace: who was computed when, a row a sequence, time to the right.

Waiting, chunks of the prompt, decodes and time spent swapped out are colours of their own. Traces are an
engine's, or a simulated one's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

from tiny_llm.data import Plan
from tiny_llm.engine.trace import Trace

COLOURS: Mapping[str, str] = {
    "waiting": "#d9d9d9",
    "prefill": "#e6862b",
    "decode": "#3b78b5",
    "swapped": "#8a5aa8",
}
WIDTH, LEFT, ROW, TOP, BOTTOM = 1000, 110, 14, 46, 34
JOIN_US = 50.0  # decodes no further apart are drawn as one bar
MOST_ROWS = 64
Event = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Stretch:
    """What a sequence did, from when to when, in microseconds."""

    name: str
    track: int
    began: float
    ended: float


def bars_of(events: Iterable[Event]) -> list[Stretch]:
    """The sequences' bars, in order of time; what follows at once on its like is one with it."""
    last: dict[int, Stretch] = {}
    done: list[Stretch] = []
    sequences = [event for event in events if event.get("name") in COLOURS]
    for event in sorted(sequences, key=lambda event: float(str(event["ts"]))):
        began = float(str(event["ts"]))
        bar = Stretch(str(event["name"]), int(str(event["tid"])), began, began + float(str(event["dur"])))
        before = last.get(bar.track)
        if before and before.name == bar.name == "decode" and bar.began - before.ended < JOIN_US:
            last[bar.track] = Stretch(bar.name, bar.track, before.began, bar.ended)
            continue
        if before:
            done.append(before)
        last[bar.track] = bar
    return sorted([*done, *last.values()], key=lambda bar: (bar.began, bar.track))


def draw(bars: Sequence[Stretch], most: int) -> str:
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
        *(
            f'<text x="{LEFT - 8}" y="{TOP + ROW * number + 10}" text-anchor="end">sequence {track}</text>'
            for track, number in rows.items()
        ),
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


def _bar(bar: Stretch, number: int, began: float, scale: float) -> str:
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


class FirstSequences(Trace):
    """A trace of the first ``MOST_ROWS`` sequences alone, whatever comes after them."""

    @property
    def events(self) -> Sequence[Event]:
        """What happened, as ``bars_of`` takes it."""
        return self._events

    def arrived(self, seq_id: int, at: float) -> None:
        """A sequence began to wait."""
        if seq_id <= MOST_ROWS:
            super().arrived(seq_id, at)

    def step(self, plan: Plan, began: float, ended: float) -> None:
        """A step was run."""
        items = [item for item in plan.items if item.seq_id <= MOST_ROWS]
        preempted = [one for one in plan.preempted if one[0] <= MOST_ROWS]
        if items or preempted:
            decodes = sum(item.seq_id <= MOST_ROWS for item in plan.items[: plan.decodes])
            super().step(replace(plan, items=items, preempted=preempted, decodes=decodes), began, ended)
