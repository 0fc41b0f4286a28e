"""Was the machine ours alone while we measured? CPU time of all processes, less that of our own.

Owns reading /proc; elsewhere than on Linux it answers that it does not know.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

QUIET_SHARE = 0.03  # of all cores; a kernel's own housekeeping is below one percent
PROC = Path("/proc")


class Watch:
    """How much of the machine others took between ``start`` and ``foreign_share``."""

    def __init__(self, own: Iterable[int]) -> None:
        self._own = (os.getpid(), *own)
        self._began = self._read()

    def foreign_share(self) -> float | None:
        """Others' part of all cores' time since the start, 0 to 1; None where it cannot be known."""
        if self._began is None or (now := self._read()) is None:
            return None
        busy, own, wall = (after - before for after, before in zip(now, self._began, strict=True))
        all_cores = wall * (os.cpu_count() or 1)
        return min(1.0, max(0.0, busy - own) / all_cores) if wall > 0 else 0.0

    def _read(self) -> tuple[float, float, float] | None:
        """Seconds: all cores busy (a hypervisor's theft included), our processes, the clock."""
        if not (PROC / "stat").exists():
            return None
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _idle, _wait, irq, softirq, steal = (
            int(word) for word in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        busy = (user + nice + system + irq + softirq + steal) / tick
        return busy, sum(_ticks(pid) for pid in self._own) / tick, time.monotonic()


def foreign_share_now(seconds: float = 1.0) -> float | None:
    """Sleep for ``seconds`` and return what share of the machine others took meanwhile."""
    watch = Watch(())
    time.sleep(seconds)
    return watch.foreign_share()


def warning(share: float | None, when: str) -> str:
    """A line to print where others took too much; empty where they did not."""
    if share is None or share <= QUIET_SHARE:
        return ""
    return f"warning: {when}, other processes took {share:.0%} of this machine; figures may be off"


def _ticks(pid: int) -> int:
    """User and system time of a process and of its dead children; 0 once it has gone."""
    try:
        after_name = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(int(word) for word in after_name[11:15])
