"""Owns one figure: the most memory that this process has held."""

from __future__ import annotations

import resource
import sys

import mlx.core as mx


def peak_memory_bytes() -> int:
    """Peak resident set of the process, or MLX's own peak where that is larger (a discrete GPU)."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, KiB on Linux
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, mx.get_peak_memory())
