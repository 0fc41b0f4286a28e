"""Chapter 4.1: tables are what the experiment prints, answers are computed, the mistakes as told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of, tables_of

PAGE, TABLES = page_of("4.1"), tables_of("4.1")

pytestmark = pytest.mark.slow
EXPERIMENT = "book/experiments/prefix_caching.py"


def test_the_table_of_4_1(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[1], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/prefix_caching.svg").read_text(), "draw it again"
    rows = [[float(cell) for cell in re.findall(r"([\d.]+)%", line)] for line in printed.splitlines()[5:]]
    assert max(abs(foretold - found) for foretold, found in rows) < 1.2, "the page says that the two agree"


def test_the_mistakes_of_4_1(run) -> None:
    printed = run(EXPERIMENT, "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == TABLES[0], f"copy this into the page:\n{printed}"
    told = {line[:28].strip(): line[28:].split() for line in printed.splitlines()[1:]}
    assert told["names-trusted"] == told["(none)"] and told["(none)"][1] == "0.0%"
    assert told["tokens-alone + names-trusted"][0] > told["(none)"][0], "it finds more than is there"


def test_the_table_of_mooncakes_trace_in_4_1(run, shared_data: Path) -> None:
    trace = shared_data / "traces" / "mooncake_conversation.jsonl"
    if not trace.is_file():
        pytest.skip(f"no trace at {trace}: it is in FAST25-release/traces of github.com/kvcache-ai/Mooncake")
    printed = run(EXPERIMENT, "--trace", trace, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[2], f"copy this into the page:\n{printed}"


def test_the_predictions_of_4_1() -> None:
    table, page = TABLES[2], PAGE
    total, different = 288_500, 182_790
    assert f"{total:,} blocks" in table and f"{different:,} are different" in table
    assert f"1 - 182,790 / 288,500 = **{1 - different / total:.1%}**".replace("%", " %") in page
    assert "28% of 1, 52% of 2, 79% of 5, 94% of 10" in table
    assert "28 % are so within a minute, 52 % within 2, 79 %\nwithin 5, 94 % within 10" in page
    row = next(line.split() for line in table.splitlines() if line.lstrip().startswith("30,000"))
    lives, foretold, found = row[1], row[3].rstrip("%"), row[4].rstrip("%")
    assert f"lives for {lives} seconds, and {foretold} % are\n    found; measured, {found} %" in page
    every_second = total / 3537  # the last prompt comes after as many seconds
    assert f"{every_second:.1f} blocks come each second" in page and round(30_000 / 52, -1) == 580
    assert round(different / total * every_second) == 52
    assert round(float(found) / (100 * (1 - different / total)), 1) == 0.9 and round(182_790 / 30_000) == 6


def test_a_trace_that_is_not_there_is_said_so(run) -> None:
    done = run(EXPERIMENT, "--trace", "nowhere.jsonl", PYTHONPATH=ROOT)
    assert done.returncode == 1 and "no trace nowhere.jsonl" in done.stderr and "Mooncake" in done.stderr
