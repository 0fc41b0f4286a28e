"""Owns how much memory: what this process has held at most, what the machine has left, what was asked for."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

import mlx.core as mx

from tiny_llm.errors import RequestError

_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")


def peak_memory_bytes() -> int:
    """Peak resident set of the process, or MLX's own peak where that is larger (a discrete GPU)."""
    return max(_peak_resident_bytes(), mx.get_peak_memory())


def available_memory_bytes() -> int:
    """Memory that can be had without swapping; on a GPU what it recommends, less what is in use."""
    if mx.default_device().type == mx.gpu:
        info = mx.device_info()
        recommended = info.get("max_recommended_working_set_size") or info.get("memory_size", 0)
        return max(0, int(recommended) - mx.get_active_memory())
    if _MEMORY.exists() and (
        found := re.search(r"^MemAvailable:\s+(\d+) kB", _MEMORY.read_text(), re.MULTILINE)
    ):
        return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def parse_bytes(text: str) -> int:
    """Read "4GB", "512 MB", "1.5GiB" or a plain number of bytes. Raises RequestError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)?\s*", text, re.IGNORECASE)
    if found is None:
        raise RequestError(f"{text!r} is no amount of memory; write it like 4GB, 512MB or 1.5GiB.")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index((unit or " ").lower()))


def _peak_resident_bytes() -> int:
    """Linux's getrusage may count the launching process too, so its own file is asked first."""
    if _STATUS.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
