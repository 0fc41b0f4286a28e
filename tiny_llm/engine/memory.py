"""Owns one figure: the most memory that this process has held."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import mlx.core as mx

_STATUS = Path("/proc/self/status")


def peak_memory_bytes() -> int:
    """Peak resident set of the process, or MLX's own peak where that is larger (a discrete GPU)."""
    return max(_peak_resident_bytes(), mx.get_peak_memory())


def _peak_resident_bytes() -> int:
    """Linux's getrusage may count the launching process too, so its own file is asked first."""
    if _STATUS.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
