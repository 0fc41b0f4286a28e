"""Which kernels run: owns the choice of backend, made once a process, and its override in a block.

``ref`` is plain mlx.core, anywhere. ``cpu`` is our C++ kernels, where the extension module was built.
``mlx`` is MLX's own fast operations, on whatever device MLX has. ``metal`` and ``metalsim`` are our Metal
kernels, on Apple's GPUs and on any CPU with clang; ``cuda`` is the same text on GPUs of NVIDIA. These three
stand on ``mlx``: ``use`` says which ops run on ours, the others are MLX's.
Knows no op: each op asks ``on_cpu`` whether its arrays are for the kernels of the module ``cpu``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import mlx.core as mx

from tiny_llm.errors import ConfigError
from tiny_llm.metalsim.build import why_not as no_metalsim
from tiny_llm.metrics import fallbacks

_PROBLEM = "its module was built for another MLX"
try:
    import tiny_llm._cpu as cpu
except ModuleNotFoundError:  # no compiler when it was installed
    cpu = None  # type: ignore[assignment]
    _PROBLEM = "its module was not built"
except ImportError as error:  # another MLX than it was built with
    cpu = None  # type: ignore[assignment]
    _PROBLEM = str(error)

__all__ = ["cpu"]  # what is imported here for others, who ask for all else by name

BACKENDS = ("ref", "cpu", "mlx", "metal", "metalsim", "cuda")
GPU_KERNELS = ("metal", "metalsim", "cuda")  # backends that run our Metal kernels' text
VARIABLE = "TINY_LLM_BACKEND"
MAX_THREADS = 1024
HOW_TO_BUILD = (
    "install a C++ compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install) "
    "and reinstall tiny_llm"
)

_ACTIVE: ContextVar[str | None] = ContextVar("backend", default=None)
_OURS: ContextVar[frozenset[str] | None] = ContextVar("ours", default=frozenset())  # none is trusted unasked


class SlowBackendWarning(UserWarning):
    """There are no CPU kernels, so that ``ref`` is used, which is slow on a CPU."""


def choose(name: str | None = None) -> str:
    """Return the backend called ``name``, else $TINY_LLM_BACKEND, else the best one there is.

    Raises ConfigError for a name that is unknown or a backend that is not there, and says how to get it.
    """
    name = name or os.environ.get(VARIABLE) or None
    if name is None:
        return _best()
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}.")
    if name == "cpu" and not works():
        raise ConfigError(f"backend 'cpu' is not there: {_why_not()}; or use backend 'ref'.")
    if name == "metal" and not mx.metal.is_available():
        raise ConfigError("backend 'metal' is not there: MLX finds no Metal device; use 'metalsim' or 'ref'.")
    if name == "cuda" and not mx.cuda.is_available():
        raise ConfigError("backend 'cuda' is not there: MLX finds no CUDA device; use 'cpu' or 'ref'.")
    if name == "metalsim" and (reason := no_metalsim()):
        raise ConfigError(f"backend 'metalsim' is not there: {reason}")
    return name


@cache
def works() -> bool:
    """Whether the extension module is there and one call of it gives what it should."""
    if cpu is None:
        return False
    try:
        ones = cpu.rms_norm(mx.ones((1, 4)), mx.ones(4), 0.0)
        return bool(mx.array_equal(ones, mx.ones((1, 4))).item())
    except (TypeError, RuntimeError, ValueError):
        return False


def _why_not() -> str:
    how = HOW_TO_BUILD if _PROBLEM == "its module was not built" else "reinstall tiny_llm"
    return f"{_PROBLEM}. To have it, {how}"


@cache
def _best() -> str:
    """Warns, once a process, where it must be ``ref`` on a CPU."""
    if mx.default_device().type != mx.cpu:
        return "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else "mlx"
    if works():
        return "cpu"
    warnings.warn(
        f"Generation is slow: there are no CPU kernels, since {_why_not()}.", SlowBackendWarning, stacklevel=2
    )
    return "ref"


def active() -> str:
    """The backend of this block of code."""
    return _ACTIVE.get() or choose()


@contextmanager
def use(name: str | None, ours: frozenset[str] | None = None) -> Iterator[str]:
    """Run a block on the backend that ``choose`` returns for ``name``.

    ``ours`` names the ops that run on our kernels where the backend is one of ``GPU_KERNELS``; None: all.
    """
    chosen = choose(name)
    tokens = _ACTIVE.set(chosen), _OURS.set(ours if chosen in GPU_KERNELS else frozenset())
    try:
        yield chosen
    finally:
        _ACTIVE.reset(tokens[0])
        _OURS.reset(tokens[1])


def runs_ours(op: str) -> bool:
    """Whether ``op`` is to run on our kernels for GPUs: they are in use, and it is among them."""
    ours = _OURS.get()
    return (ours is None or op in ours) and active() in GPU_KERNELS  # asked by each op: the cheap part first


def on_mlx() -> bool:
    """Whether an op without a kernel of ours takes MLX's fast one rather than ``ref``."""
    return active() in ("mlx", *GPU_KERNELS)


def set_threads(threads: int | None) -> None:
    """Let the CPU kernels of this process use ``threads``; None: as many as there are physical cores.

    Without the kernels nothing changes. Raises ConfigError unless it is from 1 to 1024.
    """
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
        raise ConfigError(f"threads is {threads!r}, expected a whole number from 1 to {MAX_THREADS}.")
    if threads is not None and cpu is not None:
        cpu.set_num_threads(threads)


def keep_memory() -> None:
    """Weights are loaded, and from here on memory comes and goes: let what is freed be kept for the next."""
    if active() == "cpu":
        cpu.keep_memory()


def kernel_seconds() -> float | None:
    """Seconds that the process has spent in the CPU kernels; None where they are not in use."""
    return cpu.kernel_seconds() if active() == "cpu" else None


def num_threads() -> int | None:
    """Threads of the CPU kernels; None where they are not in use."""
    return cpu.num_threads() if active() == "cpu" else None


def isa() -> str | None:
    """The instruction set that the CPU kernels use ("avx512"); None where they are not in use."""
    return cpu.isa() if active() == "cpu" else None


def on_cpu(op: str, *arrays: mx.array) -> bool:
    """Whether ``op`` is to run on the kernels in ``cpu``: they are in use, and the arrays are float32.

    Where the arrays are not, the kernels cannot take them, and ``op`` is counted as a fallback to ``ref``.
    """
    if active() != "cpu":
        return False
    if cpu.all_float32(*arrays):
        return True
    fallbacks().add(op)
    return False
