"""A trace becomes a picture: a row a sequence, a bar for each thing that it did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "plot_trace.py"
SVG = "{http://www.w3.org/2000/svg}"


def event(name: str, track: int, began_ms: float, ms: float) -> dict[str, object]:
    return {
        "name": name,
        "ph": "X",
        "pid": 1,
        "tid": track,
        "ts": began_ms * 1e3,
        "dur": ms * 1e3,
        "args": {},
    }


def run(tmp_path: Path, events: object, *options: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "trace.json"), str(tmp_path / "out.svg"), *options]
    return subprocess.run(command, capture_output=True, text=True)


def bars(tmp_path: Path) -> list[tuple[str, float, float]]:
    """What each bar's title says, its row and its width."""
    shapes = ElementTree.parse(tmp_path / "out.svg").iter(f"{SVG}rect")
    return [
        (title.text or "", float(shape.attrib["y"]), float(shape.attrib["width"]))
        for shape in shapes
        if (title := shape.find(f"{SVG}title")) is not None
    ]


def test_what_follows_at_once_is_one_bar(tmp_path: Path) -> None:
    events = [
        event("step", 0, 0, 40),
        event("prefill", 1, 0, 10),
        *(event("decode", 1, 10 + 5 * i, 5) for i in range(4)),
        event("waiting", 2, 0, 10),
        event("prefill", 2, 10, 30),
    ]
    done = run(tmp_path, events)
    assert done.returncode == 0, done.stderr
    found = bars(tmp_path)
    assert [title for title, _, _ in found] == [
        "prefill, 10.0 ms",
        "waiting, 10.0 ms",
        "decode, 20.0 ms",
        "prefill, 30.0 ms",
    ]
    rows = {title: row for title, row, _ in found}
    assert rows["prefill, 10.0 ms"] == rows["decode, 20.0 ms"] < rows["waiting, 10.0 ms"]
    assert found[3][2] == pytest.approx(3 * found[0][2], rel=0.01), "widths are times"
    assert run(tmp_path, events, "--sequences", "1").returncode == 0 and len(bars(tmp_path)) == 2


@pytest.mark.parametrize("events", [[], [event("step", 0, 0, 1)], None, "text"])
def test_no_trace_is_one_line_of_error(tmp_path: Path, events: object) -> None:
    done = run(tmp_path, events)
    assert done.returncode == 2 and "trace.json" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
