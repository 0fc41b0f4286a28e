"""Owns a progress bar on stderr. Knows not what progresses."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager

WIDTH = 24


class Bar(AbstractContextManager["Bar"]):
    """One line that is written over and over, where stderr is a terminal that can; nothing elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._shown = False

    def __exit__(self, *_: object) -> None:
        self.close()

    def show(self, part: float, words: str) -> None:
        """Show that ``part`` of 1 is done, and ``words`` after it."""
        if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
            return
        full = round(WIDTH * part)
        print(f"\r{self._title} {'━' * full}{'╌' * (WIDTH - full)} {words}\x1b[K", end="", file=sys.stderr)
        self._shown = True

    def close(self) -> None:
        """Take the bar away."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
