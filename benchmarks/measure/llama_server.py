"""llama.cpp's own server: its source is in a PyPI package, and is built here, for this processor.

Owns where it is and how it is made; `measure/environments.py` has the peers that pip can install.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measure.environments import MADE, REASON, PeerMissing, compiler

NAME = "llama-server"
SOURCE = "llama-cpp-python==0.3.36"
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


def binary_of(folder: Path) -> Path:
    """The program. Raises PeerMissing where it is not (well) made."""
    here = folder / NAME
    try:
        made = json.loads((here / MADE).read_text())
    except FileNotFoundError:
        reason = here / REASON
        said = reason.read_text().strip() if reason.exists() else "not made yet"
        raise PeerMissing(f"{said}; run: python benchmarks/peers.py make {NAME}") from None
    if made != _recipe():
        raise PeerMissing(f"made of another version; run: python benchmarks/peers.py make {NAME}")
    return here / "bin" / NAME


def make(folder: Path) -> Path:
    """Build it anew and return its path. Takes many minutes; needs cmake and a C++ compiler.

    Raises PeerMissing, with the end of what was said, and leaves that reason in the folder.
    """
    here = folder / NAME
    here.mkdir(parents=True, exist_ok=True)
    for old in (MADE, REASON):
        (here / old).unlink(missing_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=here) as scratch:
            _build(Path(scratch), here)
    except PeerMissing as missing:
        (here / REASON).write_text(f"{missing}\n")
        raise
    (here / MADE).write_text(json.dumps(_recipe()))
    return here / "bin" / NAME


def _build(scratch: Path, here: Path) -> None:
    get = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    _run([*get, "--dest", str(scratch), SOURCE], here)
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(scratch, filter="data")
    (source,) = scratch.glob("*/vendor/llama.cpp")
    build = scratch / "build"
    _run(["cmake", "-S", str(source), "-B", str(build), *OPTIONS], here)
    _run(["cmake", "--build", str(build), "--target", NAME], here)
    (here / "bin").mkdir(exist_ok=True)
    (build / "bin" / NAME).replace(here / "bin" / NAME)


def _run(command: Sequence[str], here: Path) -> None:
    log = here / "log.txt"
    with log.open("w") as output:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | compiler(),
            )
        except OSError as error:
            raise PeerMissing(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        last = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        raise PeerMissing(f"it could not be made ({' / '.join(last)}); all of it is in {log}")


def _recipe() -> object:
    return {"source": SOURCE, "options": list(OPTIONS)}
