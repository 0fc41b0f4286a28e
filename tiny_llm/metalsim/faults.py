"""What the simulator found wrong with a kernel, in words: what, where in the author's text, which threads.

Owns the structures of runtime.h that carry a report, and their meaning. Knows no compiler and no array.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiny_llm.errors import TinyLLMError
from tiny_llm.metalsim.lines import find_line

KINDS = (
    *("none", "bounds", "race", "uninitialised", "never written", "input written", "misaligned"),
    *("barrier divergence", "simd divergence", "time limit", "too much threadgroup memory", "wild pointer"),
    *("undefined", "no memory"),
)
_SIMD = ("simdgroup_barrier", "shuffle", "reduction", "prefix operation", "vote", "matrix operation")


class KernelFault(TinyLLMError):
    """A kernel did what it must not; ``kind`` is one of KINDS, ``line`` the author's file and line."""

    def __init__(self, message: str, kind: str, line: tuple[str, int] | None) -> None:
        super().__init__(message)
        self.kind, self.line = kind, line


def fields(*declared: tuple[type, str]) -> list[tuple[str, type]]:
    """The fields of a structure as C declares them: a type, and the names of those that have it."""
    return [(name, kind) for kind, names in declared for name in names.split()]


class Side(ctypes.Structure):
    """One thread's part in a fault."""

    _fields_ = fields((ctypes.c_uint64, "pc"), (ctypes.c_uint32, "group thread write"))


class Report(ctypes.Structure):
    """The first fault of a dispatch, as runtime.h has it."""

    _fields_ = fields(
        (ctypes.c_uint32, "kind bytes element op ended"),
        (ctypes.c_int32, "buffer"),
        (ctypes.c_int64, "offset"),
        (ctypes.c_uint64, "size"),
        (ctypes.c_char_p, "name"),
        (Side, "here there"),
    )


@dataclass(frozen=True)
class Where:
    """What is needed to say where something happened: code, its place in memory, the dispatch, the text."""

    kernel: str
    library: Path
    image: int
    grid: Sequence[int]
    threadgroup: Sequence[int]
    buffers: Sequence[str]
    text: dict[tuple[str, int], str]

    def line(self, pc: int) -> tuple[str, int] | None:
        """File and line of an instruction of the kernel; None outside of it."""
        return find_line(self.library, pc - self.image) if pc >= self.image else None

    def spot(self, side: Side) -> str:
        """`` at FILE:LINE `text` `` of a side, or nothing where it is unknown."""
        found = self.line(side.pc)
        if found is None:
            return ""
        text = self.text.get(found, "")
        return f" at {found[0]}:{found[1]}" + (f" `{text}`" if text else "")

    def thread(self, side: Side) -> str:
        """A thread by its places, as the kernel's author counts them."""
        sizes = list(zip(self.grid, self.threadgroup, strict=True))
        group = _place(side.group, [-(-grid // full) for grid, full in sizes])
        # The last one may be smaller.
        threads = [min(full, grid - at * full) for (grid, full), at in zip(sizes, group, strict=True)]
        return f"thread {_place(side.thread, threads)} of threadgroup {group}"


def _place(index: int, size: Sequence[int]) -> tuple[int, int, int]:
    return index % size[0], index // size[0] % size[1], index // (size[0] * size[1])


def fault(report: Report, where: Where, seconds: float) -> KernelFault:
    """The report as an error."""
    kind = KINDS[report.kind]
    line = where.line(report.here.pc)
    return KernelFault(f"kernel {where.kernel!r}: {_what(kind, report, where, seconds)}", kind, line)


def _what(kind: str, r: Report, where: Where, seconds: float) -> str:
    here, spot = where.thread(r.here), where.spot(r.here)
    there, other = where.thread(r.there), where.spot(r.there)
    does = "writes" if r.here.write else "reads"
    buffer = where.buffers[r.buffer] if r.buffer >= 0 else f"threadgroup array {_name(r)!r}"
    element = r.offset // r.element if r.element else 0
    at = f"element {element} of {buffer}"
    if kind == "bounds":
        return f"out of bounds: {here} {does} {at}, which has {r.size // max(r.element, 1)},{spot}"
    if kind == "race":
        did = "wrote" if r.there.write else "read"
        return f"race: {here} {does} {at}{spot}, and {there} {did} it{other}, with no barrier between"
    if kind == "uninitialised":
        return f"uninitialised: {here} reads {at}, which nobody has written,{spot}"
    if kind == "never written":
        return f"never written: {at} and {r.size - 1} more; write them, or give init_value or partial_outputs"
    if kind == "input written":
        return f"input written: {here} writes {at}{spot}"
    if kind == "misaligned":
        place = f"byte {r.offset} of {buffer}, no multiple of {r.size},"
        return f"misaligned: {here} {does} {r.bytes} bytes at {place}{spot}"
    if kind in ("barrier divergence", "simd divergence"):
        waits = "waits" if kind == "barrier divergence" else f"is in a {_SIMD[r.op]}"
        return (
            f"{kind}: {here} {waits}{spot}, but {there} {'has ended' if r.ended else f'is elsewhere{other}'}"
        )
    if kind == "time limit":
        return f"time limit: not done after {seconds:g} s; {here} is{spot or ' about to start'}"
    if kind == "too much threadgroup memory":
        return f"threadgroup memory: {buffer} makes it {r.size} bytes, of which there are 32768,{spot}"
    if kind == "wild pointer":
        return f"wild pointer: {here} {does} {r.bytes} bytes in no buffer at all,{spot}"
    if kind == "undefined":
        return f"undefined: {_name(r)} in {here},{spot}"
    return "the buffers do not fit the simulator's memory: at most 1 GiB each"


def _name(report: Report) -> str:
    return bytes(report.name or b"").decode()
