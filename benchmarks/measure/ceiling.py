"""What this machine can do at most, measured by a small C++ program that is compiled for it when it is asked.

Owns compiling and asking. Units a second: "read" bytes, "fma" float32 operations, "int8" operations of int8
dot products (by AMX, if there is AMX; by no other matrix unit).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("ceilings.cpp")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-std=c++17", "-pthread")
KINDS = ("read", "fma", "int8")


class CeilingsMissing(RuntimeError):
    """They cannot be measured here, and why."""


class Ceilings:
    """The running program, until ``close``. Raises CeilingsMissing without a C++ compiler."""

    def __init__(self) -> None:
        names = (os.environ.get("CXX", "c++"), "g++", "clang++")
        compiler = next(filter(None, map(shutil.which, names)), None)
        if compiler is None:
            raise CeilingsMissing("there is no C++ compiler to measure this machine's ceilings with")
        self._folder = tempfile.TemporaryDirectory()
        program = Path(self._folder.name) / "ceilings"
        built = subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(program)], capture_output=True, text=True
        )
        if built.returncode:
            self._folder.cleanup()
            raise CeilingsMissing(f"{compiler} failed: {built.stderr.strip().splitlines()[-1:]}")
        self._process = subprocess.Popen(
            [str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def rate(self, kind: str, threads: int) -> float:
        """Units a second on ``threads`` threads, now; 0 where the processor lacks the instruction."""
        assert kind in KINDS and threads > 0, f"expected one of {KINDS} and some threads"
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{kind} {threads}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process and remove what was compiled."""
        self._process.communicate()
        self._folder.cleanup()


@contextmanager
def ceilings_or_none(wanted: bool = True) -> Iterator[Ceilings | None]:
    """The running program for a block, if it is wanted; where there can be none, says why and yields None."""
    if not wanted:
        yield None
        return
    try:
        ceilings = Ceilings()
    except CeilingsMissing as missing:
        print(missing)
        yield None
        return
    with closing(ceilings):
        yield ceilings
