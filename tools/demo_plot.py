"""Draw a loss curve as an SVG: logarithmic loss over steps, no library needed."""

import math


def loss_curve(curve: list[tuple[int, float]], title: str, width: int = 720, height: int = 360) -> str:
    """Return the SVG of (step, loss) points, each the mean of its neighbours."""
    left, bottom, top, right = 60, height - 40, 40, width - 20
    span = max(1, len(curve) // 300)
    points = []
    for i in range(0, len(curve), span):
        part = curve[i : i + span]
        points.append((part[0][0], max(1e-4, sum(loss for _, loss in part) / len(part))))
    lo = math.floor(math.log10(min(loss for _, loss in points)))
    hi = math.ceil(math.log10(max(loss for _, loss in points)))
    last = max(1, points[-1][0])

    def x(step: float) -> float:
        return left + (right - left) * step / last

    def y(loss: float) -> float:
        return bottom - (bottom - top) * (math.log10(loss) - lo) / max(1, hi - lo)

    line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    grid = "".join(
        f'<line x1="{left}" x2="{right}" y1="{y(10**p):.1f}" y2="{y(10**p):.1f}" stroke="#ccc"/>'
        f'<text x="{left - 8}" y="{y(10**p) + 4:.1f}" text-anchor="end">{10.0**p:g}</text>'
        for p in range(lo, hi + 1)
    )
    marks = "".join(
        f'<text x="{x(last * k / 4):.1f}" y="{bottom + 20}" text-anchor="middle">{round(last * k / 4)}</text>'
        for k in range(5)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f'<text x="{width / 2}" y="22" text-anchor="middle" font-size="15">{title}</text>{grid}{marks}'
        f'<text x="{(left + right) / 2}" y="{height - 4}" text-anchor="middle">step</text>'
        f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="1.5"/></svg>\n'
    )
