"""The peers that we compare with, and an environment of its own for each, made from PyPI.

Owns what is installed where. Knows nothing of what a peer does: that is in workers/.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from measure.worker import WORKERS
from tiny_llm.memory import available_memory_bytes

MADE = "made.json"
REASON = "reason.txt"
_CPUS = Path("/proc/cpuinfo")


class PeerMissing(RuntimeError):
    """A peer that cannot be used, and why."""


@dataclass(frozen=True, slots=True)
class Peer:
    """What to install, and which worker then speaks for it.

    ``from_source`` packages are built here, for this processor, with ``variables`` set, where "{workers}" is
    that folder. A ``slow`` peer is asked for a few tokens once: its figures would take hours otherwise.
    """

    worker: str
    requirements: tuple[str, ...]
    from_source: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    slow: bool = False


PEERS: Mapping[str, Peer] = {
    "llamacpp": Peer(
        worker="llamacpp.py",
        requirements=("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy>=2,<3"),
        from_source=("llama-cpp-python",),
        variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
    ),
    "ik_llama": Peer(
        worker="ik_llama.py",
        requirements=("ik-llama-cpp-python==0.1.5", "gguf==0.19.0", "numpy>=2,<3"),
        from_source=("ik-llama-cpp-python",),
        variables={
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_IQK_FA_ALL_QUANTS=OFF -DCMAKE_INSTALL_RPATH=$ORIGIN"
            " -DCMAKE_PROJECT_INCLUDE={workers}/ik_llama.cmake"
        },
    ),
    "openvino": Peer(worker="openvino_int4.py", requirements=("openvino==2026.4.1", "numpy>=2,<3")),
    "torch": Peer(
        worker="torch_transformers.py",
        requirements=("torch==2.13.0", "transformers==5.23.0", "numpy>=2,<3"),
    ),
    "mlx-lm": Peer(
        worker="mlxlm.py",
        requirements=(
            "mlx[cpu]==0.32.4; sys_platform == 'linux'",
            "mlx==0.32.4; sys_platform == 'darwin'",
            "mlx-lm==0.32.2",
        ),
        slow=True,
    ),
}


def default_folder() -> Path:
    """Where the environments live unless somebody says otherwise: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tiny_llm" / "peers"


def python_of(name: str, folder: Path) -> Path:
    """The Python of a peer's environment. Raises PeerMissing where it is not (well) made."""
    peer = _peer(name)
    here = folder / name
    try:
        made = json.loads((here / MADE).read_text())
    except FileNotFoundError:
        try:
            raise PeerMissing((here / REASON).read_text().strip()) from None
        except FileNotFoundError:
            raise PeerMissing(f"not made yet; run: python benchmarks/peers.py make {name}") from None
    if made != _recipe(peer):
        raise PeerMissing(f"made of other versions; run: python benchmarks/peers.py make {name}")
    return _python(here)


def make(name: str, folder: Path) -> Path:
    """Make a peer's environment, anew if there is one, and return its Python. Takes minutes.

    Raises PeerMissing, with the end of what pip said, and leaves that reason in the folder.
    """
    peer = _peer(name)
    here = folder / name
    here.mkdir(parents=True, exist_ok=True)
    for old in (MADE, REASON):
        (here / old).unlink(missing_ok=True)
    install: list[str | Path] = [_python(here), "-m", "pip", "install", *peer.requirements]
    if peer.from_source:  # a cached build may have been for other settings
        install += ["--no-cache-dir", "--no-binary", ",".join(peer.from_source)]
    try:
        _run([sys.executable, "-m", "venv", "--clear", here], here.parent / f"{name}.log", {})
        variables = {key: value.format(workers=WORKERS) for key, value in peer.variables.items()}
        _run(install, here.parent / f"{name}.log", {**variables, **compiler()})
    except PeerMissing as missing:
        here.mkdir(parents=True, exist_ok=True)
        (here / REASON).write_text(f"{missing}\n")
        raise
    (here / MADE).write_text(json.dumps(_recipe(peer)))
    return _python(here)


def compiler() -> Mapping[str, str]:
    """A compiler a core and gigabyte, as each may take, unless told; clang for AMX, where GCC 12 errs."""
    level = "CMAKE_BUILD_PARALLEL_LEVEL"
    most = max(1, min(os.cpu_count() or 1, available_memory_bytes() // 10**9))
    chosen = {level: os.environ.get(level) or str(most)}
    clang = next(filter(shutil.which, ("clang", "clang-19", "clang-18", "clang-17")), None)
    if clang and _CPUS.exists() and "amx_int8" in _CPUS.read_text():
        chosen |= {"CC": clang, "CXX": clang.replace("clang", "clang++")}
    return chosen


def _peer(name: str) -> Peer:
    if name not in PEERS:
        raise PeerMissing(f"there is no peer {name!r}; there are {', '.join(PEERS)}")
    return PEERS[name]


def _recipe(peer: Peer) -> object:
    """What must be the same for an environment to be this peer's, as JSON gives it back."""
    return json.loads(json.dumps({**asdict(peer), "python": sys.version_info[:2]}))


def _python(here: Path) -> Path:
    return here / "bin" / "python"


def _run(command: Sequence[str | Path], log: Path, variables: Mapping[str, str]) -> None:
    """Run it with its output in ``log``. Raises PeerMissing, with the last lines, where it fails."""
    with log.open("w") as output:
        try:
            done = subprocess.run(
                [*map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | variables,
            )
        except OSError as error:
            raise PeerMissing(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        last = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        raise PeerMissing(f"it could not be made ({' / '.join(last)}); all of it is in {log}")
