"""C++ to a library that can be called: finds clang, compiles, and keeps what it made.

Owns the compiler's options, and the cache: in the user's cache folder, by a hash of text, shim, options
and compiler; where that cannot be written, in a folder of this process. Knows no Metal beyond the folder of
its headers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tiny_llm.errors import ConfigError, TinyLLMError
from tiny_llm.user_cache import user_cache, writable

VARIABLE = "TINY_LLM_CLANG"
OLDEST, NEWEST = 17, 30
MODES = ("strict", "fast")
_HERE = Path(__file__).resolve()
_COMMON = (
    *("-std=c++17", "-nostdinc", "-fno-exceptions", "-fno-rtti", "-fPIC", "-fno-stack-protector"),
    # Each operation rounds as its type says, and none is merged with another: as in MLX's safe mode.
    *("-ffp-contract=off", "-Xclang", "-ffloat16-excess-precision=none"),
    *("-Xclang", "-fbfloat16-excess-precision=none", "-w", "-fno-color-diagnostics"),
    *("-fno-caret-diagnostics", "-ferror-limit=5"),
)
_MODE: Mapping[str, tuple[str, ...]] = {
    "fast": ("-O2",),
    # Accesses stay those of the text: nothing is vectorized, and a read before a write is seen too.
    "strict": (
        *("-O1", "-fno-vectorize", "-fno-slp-vectorize", "-gdwarf-4", "-gline-tables-only"),
        "-fno-optimize-sibling-calls",
        *("-DMSIM_STRICT=1", "-fsanitize=thread", "-mllvm", "-tsan-instrument-read-before-write=1"),
        *("-mllvm", "-tsan-instrument-func-entry-exit=0", "-mllvm", "-tsan-instrument-atomics=0"),
        "-fsanitize=bounds,integer-divide-by-zero,shift-exponent",
        # Two stores made one would be at no line.
        *("-mllvm", "-sink-common-insts=0", "-mllvm", "-hoist-common-insts=0"),
    ),
}
_DIAGNOSTIC = re.compile(
    r"^(?P<file>[^:\n]+):(?P<line>\d+):(?:\d+:)? (?:fatal )?(?P<what>(?:error|warning): .*)$", re.M
)


class CompileError(TinyLLMError):
    """The kernel's text is no valid Metal: what clang says of it, at the author's lines."""


@dataclass(frozen=True)
class Toolchain:
    """A clang and a linker: the commands, and the version, which is part of the cache's key."""

    compiler: tuple[str, ...]
    linker: tuple[str, ...]
    version: str


def why_not() -> str | None:
    """Why kernels cannot be compiled here; None if they can."""
    try:
        toolchain()
    except ConfigError as error:
        return str(error)
    return None


@cache
def toolchain() -> Toolchain:
    """The first clang that is new enough: $TINY_LLM_CLANG, clang-17 and up, clang, the one in ziglang.

    Raises ConfigError if there is none, or this is no Linux on x86-64 or arm64.
    """
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise ConfigError("metalsim runs on Linux, on x86-64 or arm64; on a Mac use backend 'metal'.")
    if given := os.environ.get(VARIABLE):
        found = _clang(given)
        if found is None:
            raise ConfigError(f"{VARIABLE} is {given!r}, expected a clang of version {OLDEST} or newer.")
        return found
    for name in [f"clang-{v}" for v in range(NEWEST, OLDEST - 1, -1)] + ["clang"]:
        if found := _clang(name):
            return found
    if found := _zig():
        return found
    raise ConfigError(
        f"metalsim needs clang {OLDEST} or newer, and there is none: pip install ziglang, "
        f"or apt install clang-19, or set {VARIABLE} to one."
    )


def _clang(name: str) -> Toolchain | None:
    path = shutil.which(name)
    version = _version((path,)) if path else None
    if path is None or version is None:
        return None
    return Toolchain((path,), (path, "-nostdlib"), version)


def _zig() -> Toolchain | None:
    """PyPI's ziglang holds a whole clang and its linker in one program."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    zig = str(Path(spec.submodule_search_locations[0]) / "zig")
    version = _version((zig, "clang"))
    return Toolchain((zig, "clang"), (zig, "ld.lld"), version) if version else None


def _version(command: Sequence[str]) -> str | None:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"clang version (\d+)\S*", done.stdout)
    return found[0] if found and int(found[1]) >= OLDEST else None


@cache
def _native() -> Path:
    """Where kernels/metalsim is: in the package as it is installed, or beside it."""
    installed = _HERE.parents[1] / "kernels" / "metalsim"
    return installed if installed.is_dir() else _HERE.parents[2] / "kernels" / "metalsim"


def includes() -> tuple[Path, Path]:
    """The folders of headers: ours, which goes first, and MLX's."""
    mlx = importlib.util.find_spec("mlx")  # without loading it
    assert mlx is not None and mlx.submodule_search_locations, "the package needs it"
    return _native() / "include", Path(mlx.submodule_search_locations[0]) / "include"


@cache
def _ours() -> str:
    """A hash of all that is compiled with every kernel."""
    ours, theirs = includes()
    files = [*ours.rglob("*"), _native() / "runtime.cpp", theirs / "mlx/backend/metal/kernels/utils.h"]
    return _hash([f.read_text(encoding="utf-8") for f in sorted(files) if f.is_file()])


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _kept(name: str) -> Path | None:
    """The file ``name`` of those that were compiled once; each can be deleted at any time."""
    folder = user_cache()
    path = folder / "metalsim" / name if folder is not None else None
    return path if path is not None and path.exists() else None


@cache
def _made_in(folder: Path | None) -> Path:
    """Where this process puts what it compiles: asked once, so that no file refers to one that goes."""
    return writable(folder / "metalsim" if folder is not None else None)


def _options(mode: str) -> list[str]:
    target = f"--target={platform.machine()}-linux-gnu"
    return [target, *_COMMON, *_MODE[mode], *(f"-I{folder}" for folder in includes())]


def library(text: str, mode: str) -> Path:
    """A shared library made of the C++ ``text`` and the simulator; raises CompileError."""
    tools = toolchain()
    key = _hash([text, _ours(), tools.version, *_options(mode)])
    return _kept(f"{key}.so") or _make(f"{key}.so", text, _options(mode), [runtime(mode)])


@cache
def runtime(mode: str) -> Path:
    """The simulator's own library, which all kernels of a mode share."""
    options = [o for o in _options(mode) if not o.startswith("-fsanitize")] + ["-O2"]
    name = f"runtime-{_hash([_ours(), toolchain().version, *options])}.so"
    return _kept(name) or _make(name, (_native() / "runtime.cpp").read_text(encoding="utf-8"), options, [])


def _make(name: str, text: str, options: Sequence[str], needs: Sequence[Path]) -> Path:
    path = _made_in(user_cache()) / name
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        _compile(text, [*options, "-c", "-o", str(made)])
        command = [*toolchain().linker, "-shared", "-o", str(linked), str(made), *map(str, needs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"linking failed: {done.stderr[-2000:]}")
        linked.replace(path)  # whoever else makes it makes the same
    return path


def _compile(text: str, options: Sequence[str]) -> str:
    """What clang writes to stdout; raises CompileError with what it says, at the author's lines."""
    done = _clang_on(text, options)
    if done.returncode:
        found = [f"{file}:{line}: {what}" for file, line, what in _diagnostics(done.stderr)]
        raise CompileError("\n".join(found) or done.stderr[-2000:])
    return done.stdout


def _diagnostics(text: str) -> list[tuple[str, str, str]]:
    return [(found["file"], found["line"], found["what"]) for found in _DIAGNOSTIC.finditer(text)]


def _clang_on(text: str, options: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [*toolchain().compiler, *options, "-x", "c++", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)
