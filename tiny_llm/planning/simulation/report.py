"""Owns how simulations are shown: a table, a line of JSON each, and three pictures as SVG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby

from rich.table import Table

from tiny_llm.planning.simulation.figures import Sample

USERS: Mapping[str, tuple[str, float]] = {
    "tok/s": ("tok_s", 1),
    "TTFT p50": ("ttft_p50_ms", 1),
    "p95 ms": ("ttft_p95_ms", 1),
    "ITL p50": ("itl_p50_ms", 1),
    "p95 ms ": ("itl_p95_ms", 1),
    "good/s": ("goodput_s", 1),
    "good %": ("good_share", 100),
}
POOL: Mapping[str, tuple[str, float]] = {
    "hit %": ("hit_share", 100),
    "preempted": ("preempted", 1),
    "tokens %": ("held_share", 100),
    "kept %": ("to_come_share", 100),
    "waste %": ("wasted_share", 100),
    "cached %": ("cached_share", 100),
    "free %": ("free_share", 100),
}
"""The columns of two tables: what they show, and times what."""
PARTS: Mapping[str, tuple[str, str]] = {
    "held": ("tokens", "#3b78b5"),
    "to_come": ("kept for tokens to come", "#9dc3e6"),
    "wasted": ("never used", "#d64f4f"),
    "cached": ("cached", "#7aa874"),
    "free": ("free", "#eeeeee"),
}
"""What a pool's slots hold: how that is called, and its colour."""
WIDTH, LEFT, TOP, HEIGHT = 1000, 70, 40, 320
HUES: Sequence[str] = ("#3b78b5", "#e6862b", "#7aa874", "#8a5aa8", "#c94f6d", "#4fa3a5", "#b8a13b", "#7f7f7f")


def table(columns: Mapping[str, tuple[str, float]], rows: Mapping[str, Mapping[str, float]]) -> Table:
    """A row a policy."""
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("", no_wrap=True)
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    for called, row in rows.items():
        shown.add_row(called, *(_number(row[key] * times) for key, times in columns.values()))
    return shown


def _number(value: float) -> str:
    return f"{value:,.1f}" if value < 100 and value != int(value) else f"{value:,.0f}"


def pool_over_time(samples: Sequence[Sample]) -> str:
    """What the pool's slots held, from the first moment to the last: one area on the other."""
    end = samples[-1].at or 1.0
    lower, drawn = [0.0] * len(samples), list[str]()
    for name, (_, colour) in PARTS.items():
        parts = [getattr(one, name) for one in samples]
        totals = [max(1, sum(getattr(one, other) for other in PARTS)) for one in samples]
        upper = [low + part / total for low, part, total in zip(lower, parts, totals, strict=True)]
        places = [(LEFT + (WIDTH - LEFT - 30) * one.at / end) for one in samples]
        edge = [*zip(places, upper, strict=True), *reversed([*zip(places, lower, strict=True)])]
        points = " ".join(f"{x:.1f},{TOP + HEIGHT * (1 - share):.1f}" for x, share in edge)
        drawn.append(f'<polygon points="{points}" fill="{colour}"/>')
        lower = upper
    marks = [
        f'<text x="{LEFT - 8}" y="{TOP + HEIGHT * (1 - share) + 4}" text-anchor="end">{share:.0%}</text>'
        for share in (0, 0.5, 1)
    ]
    return _picture([*drawn, *marks, *_legend()], end)


def blocks_over_time(samples: Sequence[Sample]) -> str:
    """Whose each block is, from the first moment to the last: a colour a sequence."""
    end, rows = samples[-1].at or 1.0, len(samples[-1].owners)
    places = [LEFT + (WIDTH - LEFT - 30) * one.at / end for one in samples]
    drawn: dict[str, list[str]] = {}
    high = HEIGHT / max(1, rows)
    for row in range(rows):
        for owner, run in groupby(range(len(samples)), key=lambda at: samples[at].owners[row]):
            if owner:
                columns = list(run)
                x, last = places[columns[0]], places[min(columns[-1] + 1, len(places) - 1)]
                path = f"M{x:.1f} {TOP + row * high:.1f}h{last - x:.1f}v{high:.1f}h{x - last:.1f}z"
                drawn.setdefault(HUES[owner % len(HUES)], []).append(path)
    paths = [f'<path d="{"".join(parts)}" fill="{colour}"/>' for colour, parts in drawn.items()]
    said = (
        f'<text x="{LEFT}" y="24">blocks, the first on top; a colour a sequence; white: free or cached</text>'
    )
    return _picture([*paths, said], end)


def _legend() -> Iterable[str]:
    for number, (name, colour) in enumerate(PARTS.values()):
        x = LEFT + 170 * number
        yield f'<rect x="{x}" y="14" width="12" height="12" fill="{colour}" stroke="#ccc"/>'
        yield f'<text x="{x + 18}" y="24">{escape(name)}</text>'


def _picture(parts: Iterable[str], end: float) -> str:
    height = TOP + HEIGHT + 30
    axis = [
        f'<text x="{LEFT + (WIDTH - LEFT - 30) * mark / 5:.0f}" y="{height - 10}" text-anchor="middle">'
        f"{end * mark / 5:,.4g} s</text>"
        for mark in range(6)
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="11">'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    )
    return "\n".join([head, *parts, *axis, "</svg>\n"])
