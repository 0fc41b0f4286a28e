"""What limits a process's memory, read from made-up files and from real children that have limits."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_llm.memory_limits import memory_limits

GIB, MB = 2**30, 10**6
MEMINFO = "MemTotal:       16777216 kB\nMemFree:  9 kB\nMemAvailable:   8388608 kB\n"


class Machine:
    """A made-up /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path) -> None:
        self.files = root / "proc", root / "cgroup"
        self.write("proc/meminfo", MEMINFO + "CommitLimit:  4096 kB\nCommitted_AS:  1024 kB\n")
        self.write("proc/self/status", "Name:\tpython\nVmSize:\t  4 kB\nVmData:\t  4 kB\n")
        self.root = root

    def write(self, name: str, text: str) -> None:
        path = self.files[0].parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def group_v2(self, path: str, most: str, used: int, inactive: int, high: str = "max") -> None:
        folder = f"cgroup/{path}"
        self.write(f"{folder}/memory.max", f"{most}\n")
        self.write(f"{folder}/memory.high", f"{high}\n")
        self.write(f"{folder}/memory.current", f"{used}\n")
        self.write(f"{folder}/memory.stat", f"anon 5\ninactive_file {inactive}\nactive_file 7\n")

    def group_v1(self, path: str, most: int, used: int, inactive: int) -> None:
        folder = f"cgroup/memory/{path}"
        self.write(f"{folder}/memory.limit_in_bytes", f"{most}\n")
        self.write(f"{folder}/memory.usage_in_bytes", f"{used}\n")
        self.write(f"{folder}/memory.stat", f"inactive_file 1\ntotal_inactive_file {inactive}\n")

    @property
    def left(self) -> dict[str, int]:
        return {limit.name: limit.left for limit in memory_limits(*self.files)}

    @property
    def most(self) -> int:
        return min(limit.most for limit in memory_limits(*self.files))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_alone(machine: Machine) -> None:
    assert machine.left == {"this machine": 8 * GIB} and machine.most == 16 * GIB


def test_a_container_of_600_mb_leaves_what_is_not_used_but_for_cached_files(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/\n")
    machine.group_v2("", "600000000", 250 * MB, 50 * MB)
    assert machine.left["the cgroup /"] == 400 * MB and machine.most == 600 * MB


def test_every_group_above_counts(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/system.slice/app.service/worker\n")
    machine.group_v2("system.slice/app.service/worker", "max", 10 * MB, 0)
    machine.group_v2("system.slice/app.service", "900000000", 100 * MB, 0, high="500000000")
    machine.group_v2("system.slice", "700000000", 600 * MB, 20 * MB)
    left = machine.left
    assert left["the cgroup /system.slice/app.service"] == 400 * MB, "memory.high is a limit too"
    assert left["the cgroup /system.slice"] == 120 * MB and machine.most == 500 * MB
    assert "the cgroup /system.slice/app.service/worker" not in left, "max is no limit"


def test_the_first_version(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "9:name=systemd:/x\n4:cpu,memory:/docker/7f/child\n0::/\n")
    machine.group_v1("docker/7f/child", 9223372036854771712, 80 * MB, 0)
    machine.group_v1("docker/7f", 512 * MB, 200 * MB, 30 * MB)
    assert machine.left == {"this machine": 8 * GIB, "the cgroup /docker/7f": 342 * MB}


def test_a_path_of_the_host_that_the_container_does_not_see(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "4:memory:/docker/7f00\n0::/../../other\n")
    machine.group_v1("", 512 * MB, 600 * MB, 0)
    assert machine.left["the cgroup /"] == 0, "more is used than allowed: nothing is left, and not less"


def test_both_versions_at_once(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "4:memory:/a\n0::/b\n")
    machine.group_v1("a", 900 * MB, 0, 0)
    machine.group_v2("unified/b", "800000000", 0, 0)
    assert set(machine.left) == {"this machine", "the cgroup /a", "the cgroup /b"}


def test_memory_that_must_not_be_promised_twice(machine: Machine) -> None:
    machine.write("proc/sys/vm/overcommit_memory", "2\n")
    assert machine.left["vm.overcommit_memory"] == 3072 * 1024


def test_what_cannot_be_read_is_no_limit(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/a\n")
    machine.write("cgroup/a/memory.max", "600000000\n")  # and no memory.current
    machine.write("cgroup/memory.max", "?\n")
    assert set(machine.left) == {"this machine"}


def test_where_there_is_no_proc(tmp_path: Path) -> None:
    (limit,) = memory_limits(tmp_path / "proc", tmp_path / "cgroup")
    assert 0 < limit.left < limit.most == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


LEFT = """
import json
from tiny_llm.memory_limits import memory_limits
print(json.dumps({limit.name: limit.left for limit in memory_limits()}))
"""
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="this system does not tell what a process has mapped"
)


@needs_proc
@pytest.mark.parametrize(
    ("kind", "name"), [(resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d")]
)
def test_a_childs_own_limit_is_seen(kind: int, name: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", LEFT],
        preexec_fn=lambda: resource.setrlimit(kind, (3 * GIB, 3 * GIB)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0 < json.loads(child.stdout)[name] < 3 * GIB
