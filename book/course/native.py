"""Owns kernel files with a learner's parts in them: C++ as a library that Python can call, Metal as text.

Knows the system's C++ compiler, and no kernel. What it made is kept in the checkout's .cache.
Metal is compiled where it is run.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from book.course.manifest import ROOT
from book.course.overlay import QUICK_VARIABLE, VARIABLE, WITHOUT_VARIABLE
from book.course.sections import merged
from tiny_llm.errors import ConfigError
from tiny_llm.metalsim.build import why_not
from tiny_llm.user_cache import writable

if TYPE_CHECKING:
    import mlx.core as mx

CPU = ROOT / "kernels" / "cpu"
_FLAGS = (
    "-std=c++20",
    "-DTINY_ISA=own",
    "-DTINY_ALONE",
    "-shared",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
)
_QUICK = ("-O0",)
_WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi")


def compiler() -> str:
    """The path of $CXX, c++, g++ or clang++. Raises ConfigError if there is none."""
    names = (os.environ.get("CXX") or "c++", "c++", "g++", "clang++")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise ConfigError(
            "This chapter needs a C++ compiler, and there is none: on Debian and Ubuntu apt install g++, "
            "on macOS xcode-select --install."
        )
    return found


def build(
    kernel: str,
    folder: Path | None,
    without: Collection[str] = (),
    *,
    quick: bool = False,
    wide: bool = False,
    headers: Sequence[Path] = (),
) -> Path:
    """Compile ``kernels/cpu/<kernel>.cpp`` for this machine, with the parts of ``folder``'s file of it.

    ``quick``: to be tested and not measured, so it is compiled in a second, for any machine's vectors, or if
    ``wide`` for this one's. ``headers``: folders whose headers come before the project's. Returns the
    library; what the compiler says, at the learner's lines, goes to stderr. Raises ConfigError if it finds
    errors, and if there is no compiler.
    """
    path, alone = CPU / f"{kernel}.cpp", CPU / "alone" / f"{kernel}.cpp"
    own = folder / "kernels" / "cpu" / f"{kernel}.cpp" if folder else path
    reference, mine = path.read_text(encoding="utf-8"), own.read_text(encoding="utf-8")
    text = merged(reference, str(path), mine, os.path.relpath(own), without)
    command = [
        compiler(),
        *_FLAGS,
        *((*_QUICK, *_fast()[1:] * wide) if quick else _fast()),
        *_WARNINGS,
        *(f"-I{it}" for it in (*headers, CPU)),
    ]
    around = [alone, *(it for of in (*headers, CPU, alone.parent) for it in sorted(of.glob("*.h")))]
    parts = (text, *(it.read_text(encoding="utf-8") for it in around))
    digest = hashlib.sha256("\0".join([*command, *parts]).encode()).hexdigest()[:24]
    kept = ROOT / ".cache" / "course" / "native"
    library = kept / f"{digest}.so"
    if not library.exists():
        library = writable(kept) / library.name
        _compile([*command, "-x", "c++", "-", "-x", "c++", str(alone)], text, library)
    return library


def _fast() -> tuple[str, ...]:
    arm = platform.machine() in ("arm64", "aarch64")
    return "-O3", "-mcpu=native" if arm else "-march=native"


def _compile(command: list[str], text: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / "made.so"
        done = subprocess.run([*command, "-o", str(made)], input=text, capture_output=True, text=True)
        print(done.stderr, end="", file=sys.stderr)
        if done.returncode:
            raise ConfigError("Your C++ does not compile; what stands above says where.")
        made.replace(library)  # whoever else makes it makes the same


@cache
def learners(kernel: str, quick: bool = False, wide: bool = False) -> ctypes.CDLL:
    """The library with this process's learner's parts, where they have any: the overlay's variables say."""
    file, folder = f"kernels/cpu/{kernel}.cpp", Path(os.environ.get(VARIABLE, ""))
    quick = quick or bool(os.environ.get(QUICK_VARIABLE))
    own = folder if VARIABLE in os.environ and (folder / file).is_file() else None
    return ctypes.CDLL(str(build(kernel, own, _without(file), quick=quick, wide=wide)))


def pointers(arrays: Sequence[mx.array | None]) -> list[Any]:
    """Where the numbers of each array lie, for a library's function; None is null. All must be evaluated."""
    views = [None if it is None else ctypes.c_char.from_buffer(memoryview(cast(Any, it))) for it in arrays]
    return [None if view is None else ctypes.byref(view) for view in views]


def with_learners_parts(file: str, text: str) -> str:
    """A Metal file's ``text`` with this process's learner's parts, whose lines are those of "your ...".

    No folder's name: reports know a file by the last part of its path.
    """
    own, name = Path(os.environ[VARIABLE]) / file, Path(file).name
    if not own.is_file():
        return text
    return merged(text, name, own.read_text(encoding="utf-8"), f"your {name}", _without(file))


def _without(file: str) -> Collection[str]:
    """The parts of a file that are the reference's all the same."""
    listed = os.environ.get(WITHOUT_VARIABLE, "").split()
    return [name.removeprefix(f"{file}:") for name in listed if name.startswith(f"{file}:")]


def prepare(file: str, folder: Path) -> None:
    """Find what keeps a learner's kernel file from being run. Raises ConfigError."""
    if file.endswith(".cpp"):
        build(Path(file).stem, folder, quick=True)
    elif sys.platform != "darwin" and (reason := why_not()):
        raise ConfigError(f"Metal needs a Mac's GPU, or metalsim, which says: {reason}")
