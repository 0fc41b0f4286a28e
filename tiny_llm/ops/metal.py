"""Our Metal kernels: owns their text, read from kernels/metal, and who runs it: MLX on a GPU, or metalsim.

On GPUs of NVIDIA the same text is CUDA, on top of kernels/cuda/metal.cuh; experimental. There a pointer has
no address space, a threadgroup's array is ``__shared__``, an input without dimensions comes as a pointer, and
the last threadgroup of a grid is as large as the others.

A file is a header for all its kernels, then each one's body below ``// kernel NAME(inputs) -> (outputs)``.
An input that a kernel writes where it lies is a ``mutable NAME``; whoever calls it keeps the order.
Knows no op: each op asks ``on_metal`` whether its arrays are for Metal, and calls ``kernel``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import gcd
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from tiny_llm.errors import ConfigError
from tiny_llm.metalsim.build import MODES
from tiny_llm.metalsim.run import metal_kernel
from tiny_llm.metalsim.source import numbered
from tiny_llm.metrics import fallbacks
from tiny_llm.ops.backend import active, runs_ours

VARIABLE = "TINY_LLM_METALSIM"
FOLDER = "TINY_LLM_KERNELS"
_KERNEL = re.compile(r"^// kernel (\w+)\(([^)]*)\) -> \(([^)]*)\)$", re.MULTILINE)
_HERE = Path(__file__).resolve()
# Before every kernel's text. What is not written as fma() is rounded twice: a row's bits rest on it. And
# Apple's compiler unrolls no loop by itself: what such a loop indexes lies in memory, not in registers.
_PRELUDE = """#pragma METAL fp contract(off)
#define UNROLL _Pragma("clang loop unroll(full)")
"""
Kernel = Callable[..., list[mx.array]]
_SHARED = re.compile(r"\bthreadgroup(?=\s+\w+\s+\w+\s*\[)")
_SPACES = re.compile(r"\b(?:device|constant|threadgroup|thread)\b(?=\s+\w)")
Scalar = mx.array | float | int | bool


@dataclass(frozen=True, eq=False)  # there is one of each, and to compare texts takes time
class Text:
    """One kernel of a file, as ``metal_kernel`` wants it; the lines are known by the file's own numbers."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    header: str
    body: str
    mutable: tuple[str, ...] = ()


def on_metal(op: str, *arrays: mx.array) -> bool:
    """Whether ``op`` is to run as Metal: see ``runs_ours``, and the arrays are floats of one dtype.

    Where they are not, ``op`` is counted as a fallback.
    """
    if not runs_ours(op):
        return False
    if len({a.dtype for a in arrays}) == 1 and arrays[0].dtype in (mx.float32, mx.float16, mx.bfloat16):
        return True
    fallbacks().add(op)
    return False


@lru_cache(maxsize=1024, typed=True)
def scalar(value: float) -> mx.array:
    """A number as the array that a kernel takes: made once, not at each call."""
    return mx.array(value)


def kernel(name: str, file: str | None = None) -> Kernel:
    """The kernel ``name`` of kernels/metal/``file``.metal, called as one of ``mx.fast.metal_kernel``."""
    backend = active()
    if backend != "metalsim":
        return _found(name, file or name, backend)
    return _made(texts(file or name)[name], _mode())


@cache
def _found(name: str, file: str, backend: str) -> Kernel:
    """Looked for once: to find its file took longer than all else of a dispatch."""
    return _made(texts(file)[name], backend)


def _mode() -> str:
    """How metalsim runs: every access checked, unless $TINY_LLM_METALSIM says "fast"."""
    mode = os.environ.get(VARIABLE) or MODES[0]
    if mode not in MODES:
        raise ConfigError(f"{VARIABLE} is {mode!r}, expected one of {', '.join(MODES)}.")
    return mode


@cache
def _made(text: Text, mode: str) -> Kernel:
    parts = text.name, text.inputs, text.outputs, text.body
    if mode == "cuda":
        return cuda_kernel(*parts, text.header, folder("cuda") / "metal.cuh")
    header = _PRELUDE + text.header
    if mode == "metal":
        return cast(Kernel, mx.fast.metal_kernel(*parts, header))
    return metal_kernel(*parts, header, mode=mode, mutable_inputs=text.mutable)


def folder(of: str = "metal") -> Path:
    """Where kernels/``of`` is: in $TINY_LLM_KERNELS, in the package as it is installed, or beside it."""
    if given := os.environ.get(FOLDER):
        return Path(given) / of
    installed = _HERE.parents[1] / "kernels" / of
    return installed if installed.is_dir() else _HERE.parents[2] / "kernels" / of


def texts(file: str) -> dict[str, Text]:
    """The kernels of a file by name."""
    return _texts(folder(), f"{file}.metal")


def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _texts(place: Path, name: str) -> dict[str, Text]:
    text = _source(place / name)
    heads = list(_KERNEL.finditer(text))
    # A compiler's message then names the line of the file, not of the text that MLX makes of it.
    header = f'#line 1 "{name}"\n{text[: heads[0].start()]}'
    ends = [head.start() for head in heads[1:]] + [len(text)]
    kernels = {}
    for head, end in zip(heads, ends, strict=True):
        called, inputs, outputs = head.groups()
        body = _body(name, text, head.end() + 1, end)
        declared = _names(inputs)
        mutable = tuple(one.split()[1] for one in declared if one.startswith("mutable "))
        plain = tuple(one.removeprefix("mutable ") for one in declared)
        kernels[called] = Text(called, plain, _names(outputs), header, body, mutable)
    return kernels


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _body(file: str, text: str, start: int, end: int) -> str:
    *_, (file, line, _) = numbered(file, text[:start])  # what a learner wrote moves the lines after it
    return f'#line {line} "{file}"\n{text[start:end]}'


@dataclass(frozen=True)
class CudaText:
    """A kernel's text as ``mx.fast.cuda_kernel`` wants it."""

    inputs: tuple[str, ...]
    header: str
    body: str


def cuda_text(
    inputs: Sequence[str], header: str, body: str, scalars: Sequence[bool], prelude: str
) -> CudaText:
    """A Metal kernel in CUDA; ``scalars`` says which inputs have no dimensions, ``prelude`` is metal.cuh."""
    names = []
    read = ""
    for name, scalar in zip(inputs, scalars, strict=True):
        if scalar:  # comes as a pointer: the body's name is what it points at
            names.append(f"{name}_at")
            read += f"const auto {name} = *{name}_at; "
        else:
            names.append(name)
    return CudaText(tuple(names), f"{prelude}\n{_without_spaces(header)}", f"{read}\n{_without_spaces(body)}")


def _without_spaces(text: str) -> str:
    return _SPACES.sub("", _SHARED.sub("__shared__", text))


def cuda_kernel(
    name: str, inputs: Sequence[str], outputs: Sequence[str], body: str, header: str, prelude: Path
) -> Kernel:
    """The call of ``mx.fast.metal_kernel`` for a GPU of NVIDIA; ``prelude`` is metal.cuh."""
    before = prelude.read_text(encoding="utf-8")

    @cache
    def made(scalars: tuple[bool, ...]) -> Kernel:
        text = cuda_text(inputs, header, body, scalars, before)
        return cast(Kernel, mx.fast.cuda_kernel(name, text.inputs, outputs, text.body, text.header))

    def run(
        *, inputs: Sequence[Scalar], grid: Sequence[int], threadgroup: Sequence[int], **call: Any
    ) -> list[mx.array]:
        scalars = tuple(not isinstance(x, mx.array) or x.ndim == 0 for x in inputs)
        return made(scalars)(inputs=inputs, grid=grid, threadgroup=blocks(grid, threadgroup), **call)

    return run


def blocks(grid: Sequence[int], threadgroup: Sequence[int]) -> tuple[int, ...]:
    """The largest threadgroup that divides ``grid`` and the one asked for: no thread is beyond the grid."""
    return tuple(gcd(threads, wanted) for threads, wanted in zip(grid, threadgroup, strict=True))
