"""Owns how much memory: what this process has held at most, what the machine has left, what was asked for."""

from __future__ import annotations

import ctypes
import mmap
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from tiny_llm.errors import RequestError
from tiny_llm.memory_limits import Limit, memory_limits

BUFFER_POOL_BYTES = 2**29
"""The most that MLX may keep of buffers that it has freed, to be used again. Steps of many sizes fill it,
whatever the model: 0.54 GB, and 73 MB in use, after 40 prompts of the bundled one."""
_HEAP_BYTES = 2**28  # the most that the CPU kernels let glibc keep at the heap's end (backend.keep_memory)
_M_TRIM_THRESHOLD = -1  # of malloc.h
_MOST_DIGITS = 20  # of an amount of memory: more are a mistake
_STATUS = Path("/proc/self/status")


def peak_memory_bytes() -> int:
    """Peak resident set of the process, or MLX's own peak where that is larger (a discrete GPU)."""
    return max(_resident_bytes("VmHWM"), mx.get_peak_memory())


def held_memory_bytes() -> int:
    """The same of now. MLX alone does not know of weights and pages in the kernels' own memory."""
    return max(_resident_bytes("VmRSS"), mx.get_active_memory() + mx.get_cache_memory())


def available_memory_bytes() -> int:
    """Memory that can be had now: the least of what the process's limits leave. On a GPU, of its memory."""
    return min(limit.left for limit in _limits())


def narrowest_limit() -> Limit:
    """The limit that leaves the least in the best of times, when nobody else takes any memory."""
    return min(_limits(), key=lambda limit: limit.most)


def _limits() -> list[Limit]:
    if mx.default_device().type == mx.gpu:
        return [_gpu_limit(mx.device_info())]
    return memory_limits()


def _gpu_limit(info: Mapping[str, str | int]) -> Limit:
    """What Metal recommends, or all that a card has, of which other processes may hold some."""
    most = int(info.get("max_recommended_working_set_size") or info.get("total_memory") or 0)
    left = most - mx.get_active_memory()
    if "free_memory" in info:  # what MLX keeps of freed buffers is not free to the card, but to us
        left = min(left, int(info["free_memory"]) + mx.get_cache_memory())
    return Limit("the GPU", max(0, left), most)


def kept_bytes(available: int) -> int:
    """What MLX may keep of freed buffers, where there are ``available`` bytes at the start."""
    return min(BUFFER_POOL_BYTES, available // 8)


def limit_kept_memory() -> None:
    """Let no more than ``kept_bytes`` be kept of what is freed from now on, by MLX and again by glibc.

    The second keeps what the first gives back: in a small container the two took more than the pool.
    """
    most = kept_bytes(available_memory_bytes())
    mx.set_cache_limit(most)
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None and most < _HEAP_BYTES:
        set_option(_M_TRIM_THRESHOLD, most)


def wire_memory() -> None:
    """Let Metal keep what it works with in memory, as much of it as the device recommends."""
    most = mx.device_info().get("max_recommended_working_set_size")
    if most:
        mx.set_wired_limit(int(most))


def give_back_memory() -> None:
    """Let go of what is kept for the next operation: MLX's buffers, and glibc's pages that nobody uses."""
    mx.clear_cache()
    trim_heap()


def trim_heap() -> None:
    """Let go of glibc's pages that nobody uses."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def forget_end(array: mx.array, start: int) -> bool:
    """Let go of an array's memory from byte ``start`` on: whole pages, which are 0 then. False: it cannot go.

    Nobody may be about to read it, and it must have been mapped for itself. Only Linux does this at once.
    """
    if sys.platform != "linux":
        return False
    first = ctypes.addressof(ctypes.c_char.from_buffer(memoryview(array)))  # type: ignore[arg-type]
    begin = -(-(first + start) // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (first + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
    madvise = ctypes.CDLL(None).madvise
    return size <= 0 or not madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def parse_bytes(text: str, name: str) -> int:
    """Read "4GB", "512 MB", "1.5GiB" or a plain number of bytes.

    Raises RequestError for anything else, that option ``name`` cannot be it.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)?\s*", text, re.IGNORECASE)
    if found is None or len(found[1]) > _MOST_DIGITS:
        what = f"{name} is {text[:40]!r}, which is no amount of memory"
        raise RequestError(f"{what}; write it like 4GB, 512MB or 1.5GiB.")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index((unit or " ").lower()))


def _resident_bytes(which: str) -> int:
    """Linux's getrusage may count the launching process too, so its own file is asked first."""
    if _STATUS.exists() and (found := re.search(rf"^{which}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, and the most there has been
