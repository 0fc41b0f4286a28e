"""Owns what limits this process's memory: the machine, its cgroups, its own address space.

Linux tells in files; elsewhere only the machine is known. A container is a cgroup: what the machine has free
says nothing there.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_NO_LIMIT = 2**62  # what version 1 says, in pages, where there is none


class Limit(NamedTuple):
    """Something that bounds this process's memory: ``left`` bytes now, and ``most`` in the best of times."""

    name: str
    left: int
    most: int


def memory_limits(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> list[Limit]:
    """All limits that this process is under, the machine's first.

    ``cgroups`` is where those are mounted, version 1 or 2 or both.
    """
    machine = _machine(proc)
    if machine is None:
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return [Limit("this machine", pages // 2, pages)]
    return [machine, *_commit(proc), *_cgroups(proc, cgroups), *_own(proc)]


def _machine(proc: Path) -> Limit | None:
    found = _kilobytes(proc / "meminfo")
    if "MemAvailable" not in found:
        return None
    return Limit("this machine", found["MemAvailable"], found["MemTotal"])


def _commit(proc: Path) -> Iterator[Limit]:
    """Where nothing may be promised twice (vm.overcommit_memory is 2), what is mapped counts, used or not."""
    if _read(proc / "sys/vm/overcommit_memory").strip() == "2":
        found = _kilobytes(proc / "meminfo")
        left = max(0, found["CommitLimit"] - found["Committed_AS"])
        yield Limit("vm.overcommit_memory", left, left)


def _cgroups(proc: Path, cgroups: Path) -> Iterator[Limit]:
    """Each cgroup that this process is in, up to the mount's own; those that set no limit are left out.

    In a container the path may be the host's, of which the mount shows only the end: what is not there is
    passed over, and the mount's own files are the container's.
    """
    unified = cgroups / "unified"
    second = unified if unified.is_dir() else cgroups
    for line in _read(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, read = second, _second_version
        elif "memory" in controllers.split(","):
            mount, read = cgroups / "memory", _first_version
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            limit = read(mount.joinpath(*parts[:depth]), "/" + "/".join(parts[:depth]))
            if limit is not None:
                yield limit


def _first_version(folder: Path, name: str) -> Limit | None:
    most = _number(folder / "memory.limit_in_bytes")
    return _cgroup(folder, name, most, "memory.usage_in_bytes", "total_inactive_file")


def _second_version(folder: Path, name: str) -> Limit | None:
    """Above ``memory.high`` a group is slowed down until it can hardly move: it is a limit, too."""
    bounds = [_number(folder / file) for file in ("memory.max", "memory.high")]
    most = min((bound for bound in bounds if bound is not None), default=None)
    return _cgroup(folder, name, most, "memory.current", "inactive_file")


def _cgroup(folder: Path, name: str, most: int | None, usage: str, reclaimable: str) -> Limit | None:
    """Pages of files that nobody has read lately count as used, but go when the group needs memory."""
    used = _number(folder / usage)
    if most is None or most >= _NO_LIMIT or used is None:
        return None
    found = re.search(rf"^{reclaimable} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
    held = used - (int(found[1]) if found else 0)
    return Limit(f"the cgroup {name}", max(0, most - held), most)


def _own(proc: Path) -> Iterator[Limit]:
    """``ulimit -v`` and ``-d``: what is mapped counts, used or not, and comes back from nobody else."""
    status = _kilobytes(proc / "self/status")
    rows = (("ulimit -v", resource.RLIMIT_AS, "VmSize"), ("ulimit -d", resource.RLIMIT_DATA, "VmData"))
    for name, kind, counted in rows:
        most, _ = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY and counted in status:
            left = max(0, most - status[counted])
            yield Limit(name, left, left)


def _kilobytes(path: Path) -> dict[str, int]:
    """The lines "Name:   123 kB" of a file, in bytes."""
    rows = re.findall(r"^(\w+):\s+(\d+) kB", _read(path), re.MULTILINE)
    return {name: 1024 * int(size) for name, size in rows}


def _number(path: Path) -> int | None:
    """The number that is all of a file; None for "max", or where there is no file."""
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    """A file's text; none, where it is not there or not for us to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
