"""tools/setup_env.sh on machines that lack something; stand-ins play only what would be downloaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "setup_env.sh"
OLD_PYTHON = "exit 1"  # fails the check of its version, as 3.9 does
NO_VENV = (
    f'case "$*" in *venv*) echo "ensurepip is not available" >&2; exit 1;; esac; exec {sys.executable} "$@"'
)
NOTES_ARGUMENTS = 'echo "$(basename "$0") $*" >> called'
NEEDS = """case "$*" in
*tomllib*) echo nanobind;;
*scikit_build_core*) echo cmake;;
*/dev/stdin) while read -r line; do echo "wanted $line" >> called; done;;
esac"""
MAKES_VENV = '[ -x .venv/bin/python ] || { mkdir -p .venv/bin; cp "$0" .venv/bin/python; }'


class Machine:
    """A folder with the script, and a PATH that holds just what a test puts there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        for folder in (self.bin, root / "tools"):
            folder.mkdir()
        shutil.copy(SCRIPT, root / "tools")
        for name in ("basename", "cp", "dirname", "mkdir"):
            (self.bin / name).symlink_to(shutil.which(name) or name)

    def add(self, name: str, *body: str) -> None:
        """Put a shell script on the PATH."""
        (self.bin / name).write_text("\n".join(["#!/bin/sh", *body, ""]), encoding="utf-8")
        (self.bin / name).chmod(0o755)

    def set_up(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the script."""
        command = ["/bin/sh", str(self.root / "tools" / "setup_env.sh"), *args]
        return subprocess.run(command, env={"PATH": str(self.bin), **env}, capture_output=True, text=True)

    @property
    def calls(self) -> str:
        """What the stand-ins were called with, a line a call."""
        return (self.root / "called").read_text(encoding="utf-8")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """An empty machine."""
    return Machine(tmp_path)


@pytest.mark.parametrize("pythons", [(), ("python3",), ("python3", "python3.12", "python")])
def test_no_python_or_only_old_ones(machine: Machine, pythons: tuple[str, ...]) -> None:
    for name in pythons:
        machine.add(name, OLD_PYTHON)
    result = machine.set_up()
    assert result.returncode == 2, result
    assert "No Python >= 3.11 found" in result.stderr and "apt install python3" in result.stderr


def test_named_python_is_the_only_one_tried(machine: Machine) -> None:
    machine.add("python3", "exit 0")
    result = machine.set_up(PYTHON="/nowhere/python3.12")
    assert result.returncode == 2 and "No Python >= 3.11 found at /nowhere/python3.12" in result.stderr, (
        result
    )


def test_debian_python_without_venv(machine: Machine) -> None:
    machine.add("python3", NO_VENV)
    result = machine.set_up()
    assert result.returncode == 2, result
    assert "ensurepip is not available" in result.stderr and "apt install python3-venv" in result.stderr


def test_pip_installs_the_extra_editable(machine: Machine) -> None:
    machine.add("python3", NOTES_ARGUMENTS, MAKES_VENV)
    result = machine.set_up("test")
    assert result.returncode == 0, result
    assert "python3 -m venv --clear .venv" in machine.calls
    assert machine.calls.endswith("--no-build-isolation --editable .[test]\n"), machine.calls


def test_what_the_build_needs_goes_into_the_same_environment(machine: Machine) -> None:
    machine.add("python3", NOTES_ARGUMENTS, NEEDS, MAKES_VENV)
    result = machine.set_up()
    assert result.returncode == 0, result
    calls = [line for line in machine.calls.splitlines() if line.startswith(("wanted", "python -m"))]
    pip = "python -m pip install --quiet --disable-pip-version-check"
    assert calls == [
        f"{pip} -r /dev/stdin",
        "wanted nanobind",
        f"{pip} -r /dev/stdin",
        "wanted cmake",
        f"{pip} --no-build-isolation --editable .",
    ], machine.calls


def test_uv_is_used_where_there_is_one(machine: Machine) -> None:
    machine.add("uv", NOTES_ARGUMENTS, MAKES_VENV)
    result = machine.set_up()
    assert result.returncode == 0, result
    assert [line for line in machine.calls.splitlines() if line.startswith("uv")] == [
        "uv venv --quiet --clear --python >=3.11 .venv",
        "uv pip install --quiet --python .venv/bin/python -r /dev/stdin",
        "uv pip install --quiet --python .venv/bin/python --no-build-isolation --editable .",
    ]


def test_pip_takes_over_when_uv_fails(machine: Machine) -> None:
    machine.add("uv", "exit 3")
    machine.add("python3", NOTES_ARGUMENTS, MAKES_VENV)
    result = machine.set_up()
    assert result.returncode == 0 and "trying venv and pip" in result.stderr, result
    assert machine.calls.endswith("--editable .\n"), machine.calls
