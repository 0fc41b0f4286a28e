"""Runs the pages' experiments, and puts what they print and draw into the pages: make book-experiments.

An experiment on a page is a sh block whose one line runs book/experiments/NAME.py or a benchmark, and after
it a text block: what it printed, but for a benchmark's line of JSON. Where there is a docs/img/NAME.svg,
--svg draws it anew.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

BOOK = Path(__file__).resolve().parent
EXPERIMENT = re.compile(
    r"^```sh\npython ((?:book/experiments|benchmarks)/(\w+)\.py[^\n]*)\n```\n\n```text\n(.*?)^```$",
    re.M | re.S,
)


def run(command: str, name: str) -> str:
    """What an experiment prints, in the checkout; its picture is drawn if it has one."""
    picture = BOOK / "docs" / "img" / f"{name}.svg"
    draw = ["--svg", str(picture)] if picture.is_file() else []
    words = [sys.executable, *shlex.split(command, comments=True), *draw]
    environment = {**os.environ, "PYTHONPATH": str(BOOK.parent)}
    done = subprocess.run(
        words, cwd=BOOK.parent, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return re.sub(r"^{.*}\n\Z", "", done.stdout, flags=re.M)


def regenerated(page: str, run: Callable[[str, str], str]) -> str:
    """The page with each experiment's text block as ``run(command, name)`` returns it."""

    def fresh(found: re.Match[str]) -> str:
        command, name, old = found.groups()
        return found[0].removesuffix(f"{old}```") + run(command, name).rstrip("\n") + "\n```"

    return EXPERIMENT.sub(fresh, page)


def main() -> None:
    """Go through all pages."""
    for page in sorted((BOOK / "docs").rglob("*.md")):
        old = page.read_text(encoding="utf-8")
        new = regenerated(old, run)
        if EXPERIMENT.search(old):
            print(f"{page.relative_to(BOOK.parent)}: {'changed' if new != old else 'as it was'}")
        page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
