"""Our Metal kernels as CUDA: owns how one text serves both, on top of kernels/cuda/metal.cuh. Experimental.

Settled here: in CUDA a pointer has no address space, a threadgroup's array is ``__shared__``, an input
without dimensions comes as a pointer, and the last threadgroup of a grid is as large as the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

Kernel = Callable[..., list[mx.array]]
_SHARED = re.compile(r"\bthreadgroup(?=\s+\w+\s+\w+\s*\[)")
_SPACES = re.compile(r"\b(?:device|constant|threadgroup|thread)\b(?=\s+\w)")
Scalar = mx.array | float | int | bool


@dataclass(frozen=True)
class Source:
    """A kernel's text as ``mx.fast.cuda_kernel`` wants it."""

    inputs: tuple[str, ...]
    header: str
    body: str


def source(inputs: Sequence[str], header: str, body: str, scalars: Sequence[bool], prelude: str) -> Source:
    """A Metal kernel in CUDA; ``scalars`` says which inputs have no dimensions, ``prelude`` is metal.cuh."""
    names = []
    read = ""
    for name, scalar in zip(inputs, scalars, strict=True):
        if scalar:  # comes as a pointer: the body's name is what it points at
            names.append(f"{name}_at")
            read += f"const auto {name} = *{name}_at; "
        else:
            names.append(name)
    return Source(tuple(names), f"{prelude}\n{_without_spaces(header)}", f"{read}\n{_without_spaces(body)}")


def _without_spaces(text: str) -> str:
    return _SPACES.sub("", _SHARED.sub("__shared__", text))


def cuda_kernel(
    name: str, inputs: Sequence[str], outputs: Sequence[str], body: str, header: str, prelude: Path
) -> Kernel:
    """The call of ``mx.fast.metal_kernel`` for a GPU of NVIDIA; ``prelude`` is metal.cuh."""
    before = prelude.read_text(encoding="utf-8")

    @cache
    def made(scalars: tuple[bool, ...]) -> Kernel:
        text = source(inputs, header, body, scalars, before)
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
