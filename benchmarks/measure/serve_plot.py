"""The figures of `benchmarks/serve.py` as an SVG: a panel a question, a group a case, a bar a side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

PANELS = (
    ("tok_s", "tokens a second"),
    ("ttft_p50_ms", "first token, ms (median)"),
    ("itl_p50_ms", "between tokens, ms (median)"),
)
COLOURS = ("#3b78b5", "#8ab4dc", "#e6862b", "#8a5aa8", "#5a9c5a")
WIDTH, PANEL, LEFT, TOP, BAR, BETWEEN = 1000, 190, 60, 50, 120, 30
Cases = Mapping[str, Mapping[str, Mapping[str, float]]]


def draw(cases: Cases) -> str:
    """The picture. Raises ValueError where there is nothing to draw."""
    if not cases:
        raise ValueError("there are no figures to draw")
    names = list(dict.fromkeys(name for rows in cases.values() for name in rows))
    height = TOP + PANEL * len(PANELS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        *_legend(names),
    ]
    for number, (key, title) in enumerate(PANELS):
        parts += _panel(cases, names, key, title, TOP + PANEL * number)
    return "\n".join([*parts, "</svg>"])


def _legend(names: list[str]) -> Iterator[str]:
    for number, name in enumerate(names):
        x = LEFT + 180 * number
        yield f'<rect x="{x}" y="14" width="12" height="12" fill="{COLOURS[number % len(COLOURS)]}"/>'
        yield f'<text x="{x + 18}" y="24">{escape(name)}</text>'


def _panel(cases: Cases, names: list[str], key: str, title: str, top: int) -> Iterator[str]:
    most = max((row[key] for rows in cases.values() for row in rows.values()), default=0) or 1.0
    group = (WIDTH - LEFT - 10) / len(cases)
    width = (group - BETWEEN) / len(names)
    base = top + 20 + BAR
    yield f'<text x="{LEFT}" y="{top + 8}" font-weight="bold">{escape(title)}</text>'
    yield f'<path d="M{LEFT} {base}H{WIDTH - 10}" stroke="#999"/>'
    for number, (case, rows) in enumerate(cases.items()):
        x = LEFT + group * number
        middle = x + (group - BETWEEN) / 2
        yield f'<text x="{middle:.1f}" y="{base + 16}" text-anchor="middle">{escape(case)}</text>'
        for name, row in rows.items():
            at, high = names.index(name), BAR * row[key] / most
            left, colour = x + width * at, COLOURS[at % len(COLOURS)]
            small = 'text-anchor="middle" font-size="10"'
            box = f'x="{left:.1f}" y="{base - high:.1f}" width="{width - 3:.1f}" height="{high:.1f}"'
            label = f'x="{left + width / 2:.1f}" y="{base - high - 3:.1f}" {small}'
            yield f'<rect {box} fill="{colour}"><title>{escape(name)}: {row[key]:.1f}</title></rect>'
            yield f"<text {label}>{row[key]:.0f}</text>"
