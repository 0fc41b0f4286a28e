"""Counters that any floor may add to. Owns counting; what a count means is its caller's."""

from __future__ import annotations

from collections import Counter
from functools import cache
from threading import Lock


class Counts:
    """How often each name was counted; safe from several threads."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = Lock()

    def add(self, name: str) -> None:
        """Count ``name`` once more."""
        with self._lock:
            self._counts[name] += 1

    def read(self) -> dict[str, int]:
        """Every name counted so far, with how often."""
        with self._lock:
            return dict(self._counts)


@cache
def fallbacks() -> Counts:
    """Calls, by op, that the backend in use had no kernel for, and that ran on ``ref`` instead."""
    return Counts()
