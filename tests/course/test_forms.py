"""Chapter 4.4: tables are what the experiment prints, answers are computed, the mistakes as told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of
from tiny_llm.decoding.regex import State, after, opened, parsed

PAGE = page_of("4.4")

pytestmark = pytest.mark.slow
EXPERIMENT = "book/experiments/forms.py"


def tables() -> list[str]:
    """What the page says that its experiment prints."""
    return re.findall(r"^python book[^\n]+\n```\n\n```text\n(.*?)^```$", PAGE, re.S | re.M)


def states(pattern: str) -> list[State]:
    """All that a text can come to."""
    found = [opened([parsed(pattern)])]
    for state in found:
        left = (after(state, bytes([byte])) for byte in range(256))
        found += [new for new in dict.fromkeys(left) if new and new not in found]
    return found


def test_the_table_of_4_4(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == tables()[1], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/forms.svg").read_text(), "draw it again"


def test_the_mistakes_of_4_4(run) -> None:
    printed = run(EXPERIMENT, "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == tables()[0], f"copy this into the page:\n{printed}"
    told = {line.split()[0]: line.split()[1:5] for line in printed.splitlines()[1:]}
    for name in ("ends-when-it-can", "star-once", "empty-ones-too"):
        assert told[name][:3] == told["(none)"][:3] == ["100", "0", "0"]
    assert float(told["ends-when-it-can"][3]) < float(told["star-once"][3]) < float(told["(none)"][3])
    assert float(told["empty-ones-too"][3]) > float(told["(none)"][3])


def test_the_predictions_of_4_4() -> None:
    assert f"**{len(states('[0-9]+(, [0-9]+)*'))}**. At the beginning" in PAGE
    assert f"64 x 151,936 = **{64 * 151_936 / 1e6:.1f} MB**" in PAGE
    assert f"in bits **{64 * 151_936 / 8e6:.1f} MB**" in PAGE


def test_times_are_told(run) -> None:
    """They are another machine's; the lines are these."""
    printed = run(EXPERIMENT, "--times", PYTHONPATH=ROOT).stdout
    assert len(printed.splitlines()) == 8 and "by hand" in printed and "151,936: " in printed
