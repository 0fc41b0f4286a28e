"""Which kernels run: owns the choice of backend, made once a process, and its override in a block.

``ref`` is plain mlx.core, anywhere. ``cpu`` is our C++ kernels, where the extension module was built.
Knows no op: each op asks ``cpu_kernels`` whether its arrays are for the CPU's kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING

import mlx.core as mx

from tiny_llm.errors import ConfigError

_cpu = None
with suppress(ImportError):
    from tiny_llm import _cpu  # type: ignore[no-redef]

if TYPE_CHECKING:
    from tiny_llm import _cpu as CpuKernels

BACKENDS = ("ref", "cpu")
VARIABLE = "TINY_LLM_BACKEND"

_ACTIVE: ContextVar[str | None] = ContextVar("backend", default=None)


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
        raise ConfigError(
            "backend 'cpu' was not built: install a C++ compiler (Debian: apt install g++; macOS: "
            "xcode-select --install), then reinstall tiny_llm; or use backend 'ref'."
        )
    return name


@cache
def works() -> bool:
    """Whether the extension module is there and one call of it gives what it should."""
    if _cpu is None:
        return False
    try:
        ones = _cpu.rms_norm(mx.ones((1, 4)), mx.ones(4), 0.0)
        return bool(mx.array_equal(ones, mx.ones((1, 4))).item())
    except (TypeError, RuntimeError, ValueError):  # another MLX or nanobind than it was built with
        return False


@cache
def _best() -> str:
    return "cpu" if mx.default_device().type == mx.cpu and works() else "ref"


def active() -> str:
    """The backend of this block of code."""
    return _ACTIVE.get() or choose()


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run a block on one backend."""
    token = _ACTIVE.set(choose(name))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def cpu_kernels(*arrays: mx.array) -> CpuKernels | None:  # type: ignore[valid-type]
    """The CPU kernels' module if it is in use and the arrays are float32, which is what it computes in."""
    if active() == "cpu" and all(a.dtype == mx.float32 for a in arrays):
        return _cpu
    return None
