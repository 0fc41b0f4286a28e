"""``metal_kernel``: the call of ``mx.fast.metal_kernel``, run here. Owns arrays in and out, and one dispatch.

It is eager: inputs are evaluated, the kernel runs, and arrays come back. Knows no op.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx

from tiny_llm.errors import ConfigError
from tiny_llm.metalsim import build
from tiny_llm.metalsim.faults import Report, Where, fault, fields
from tiny_llm.metalsim.source import Input, Kernel, Template, author_lines, program

Array = mx.array | bool | int | float
_MAX_THREADS = 1024
_MAX_BUFFERS = 96
_INPUT, _OUTPUT, _MUTABLE = 0, 1, 2
_ALIGNED = 16  # bytes that are loaded at once, at most, and on a GPU a buffer begins at more


class _Buffer(ctypes.Structure):
    """As runtime.h has it."""

    _fields_ = fields(
        (ctypes.c_void_p, "data"),
        (ctypes.c_uint64, "bytes read written fetched loads"),
        (ctypes.c_uint32, "element role must_be_written unused"),
    )


class _Launch(ctypes.Structure):
    """As runtime.h has it."""

    _fields_ = fields(
        (ctypes.c_void_p, "kernel buffer pointers image"),
        (ctypes.c_uint64, "image_bytes simd_operations barriers"),
        (ctypes.c_double, "seconds"),
        (ctypes.c_uint32 * 3, "grid threads"),
        (ctypes.c_uint32, "buffers seed"),
    )


@dataclass(frozen=True)
class Traffic:
    """What one dispatch did: bytes by buffer, which are 0 in mode "fast", and how often threads met.

    ``read`` and ``written`` count each thread's. ``fetched`` counts an element once a threadgroup: what must
    come from beyond the caches of the cores. ``loads`` counts a thread's, however wide.
    """

    read: dict[str, int]
    fetched: dict[str, int]
    written: dict[str, int]
    loads: dict[str, int]
    simd_operations: int
    barriers: int


_WATCHED: ContextVar[list[tuple[str, Traffic]] | None] = ContextVar("watched", default=None)


@contextmanager
def watch() -> Iterator[list[tuple[str, Traffic]]]:
    """Note each dispatch of a block: the kernel's name, and what it read and wrote."""
    watched: list[tuple[str, Traffic]] = []
    token = _WATCHED.set(watched)
    try:
        yield watched
    finally:
        _WATCHED.reset(token)


class _Bound(NamedTuple):
    """A buffer of the dispatch: its name, what the simulator is told of it, who keeps its memory alive."""

    name: str
    buffer: _Buffer
    keep: object


def _element(dtype: mx.Dtype) -> int:
    """Bytes of what the checker counts as one; a complex number is two."""
    return dtype.size // 2 if dtype == mx.complex64 else dtype.size


def _metal(dtype: mx.Dtype) -> str:
    """Metal's name of a dtype."""
    if dtype == mx.float64:
        raise ConfigError(f"Metal has no {dtype}; give float32, float16 or bfloat16.")
    name = str(dtype).removeprefix("mlx.core.")
    return {"bool": "bool", "float32": "float"}.get(name, f"{name}_t")


@dataclass(frozen=True)
class MetalKernel:
    """A kernel as ``mx.fast.metal_kernel`` makes it, to be run here.

    ``mode`` "strict" checks every access, "fast" none. ``seed`` decides the order of threads in "strict".
    ``partial_outputs`` may be left unwritten; ``mutable_inputs`` may be written, and are changed in place.
    Raises ConfigError for another mode, ValueError without an output.
    """

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False
    compile_options: object = None
    _: KW_ONLY
    mode: str = "strict"
    seed: int = 1
    partial_outputs: Sequence[str] = ()
    mutable_inputs: Sequence[str] = ()
    time_limit: float = 60.0

    def __post_init__(self) -> None:
        if self.mode not in build.MODES:
            raise ConfigError(f"mode is {self.mode!r}, expected one of {', '.join(build.MODES)}.")
        if not self.output_names:
            raise ValueError("[metal_kernel] expected at least one output, got none")

    def __call__(self, *, stream: object = None, **call: Any) -> list[mx.array]:
        """Run the kernel; return its outputs. What it takes, and raises, is what ``measure`` does."""
        outputs, traffic = self.measure(**call)
        if (watched := _WATCHED.get()) is not None:
            watched.append((self.name, traffic))
        return outputs

    def measure(
        self,
        *,
        inputs: Sequence[Array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, mx.Dtype | bool | int]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
    ) -> tuple[list[mx.array], Traffic]:
        """The outputs, and what the dispatch read and wrote.

        Raises KernelFault, CompileError, ConfigError, ValueError.
        """
        arrays = self._inputs(inputs)
        kernel = self.variant(arrays, output_dtypes, template or ())
        if verbose:
            print(f"Generated source code for `{self.name}`:\n```\n{kernel.text}\n```")
        threads = _checked(grid, threadgroup)
        sizes = [prod(shape) for shape in output_shapes]
        outputs = [_room(size, d, init_value) for size, d in zip(sizes, output_dtypes, strict=True)]
        bound = [*self._bind(kernel, arrays), *self._bind_outputs(outputs, output_dtypes, init_value)]
        traffic = self._launch(kernel, bound, grid, threads)
        made = zip(outputs, output_shapes, output_dtypes, strict=True)
        return [_array(memory, shape, dtype) for memory, shape, dtype in made], traffic

    def variant(
        self,
        inputs: Sequence[mx.array],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, mx.Dtype | bool | int]],
    ) -> Kernel:
        """The kernel's text for inputs of these types."""
        if len(output_dtypes) != len(self.output_names):
            raise ValueError(
                f"[metal_kernel] expected {len(self.output_names)} output dtypes, got {len(output_dtypes)}"
            )
        named = zip(self.input_names, inputs, strict=True)
        given = tuple(Input(name, _metal(array.dtype), array.size, array.ndim) for name, array in named)
        outputs = tuple(zip(self.output_names, map(_metal, output_dtypes), strict=True))
        arguments: tuple[Template, ...] = tuple(
            (name, _metal(value) if isinstance(value, mx.Dtype) else value) for name, value in template
        )
        return Kernel(self.name, self.header, self.source, given, outputs, arguments, self.atomic_outputs)

    def _inputs(self, inputs: Sequence[Array]) -> list[mx.array]:
        if len(inputs) != len(self.input_names):
            raise ValueError(
                f"[metal_kernel] expected {len(self.input_names)} inputs "
                f"({', '.join(self.input_names)}), got {len(inputs)}"
            )
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        mx.eval(arrays)
        if self.ensure_row_contiguous:
            given = zip(self.input_names, arrays, strict=True)
            arrays = [x if name in self.mutable_inputs else mx.contiguous(x) for name, x in given]
            mx.eval(arrays)
        for name, x in zip(self.input_names, arrays, strict=True):
            if name in self.mutable_inputs and x.size and not _memory(x).c_contiguous:
                raise ValueError(
                    f"[metal_kernel] expected {name} row by row: MLX would write to a copy of it"
                )
        return arrays

    def _bind(self, kernel: Kernel, inputs: Sequence[mx.array]) -> Iterator[_Bound]:
        arrays = dict(zip(self.input_names, inputs, strict=True))
        for p in kernel.parameters:
            array = arrays.get(p.name)
            if p.what == "output" or array is None:
                continue
            if p.what == "data":
                yield _bound_array(p.name, array, _MUTABLE if p.name in self.mutable_inputs else _INPUT)
            else:
                values = {"shape": array.shape, "strides": _strides(array), "ndim": (array.ndim,)}[p.what]
                yield _bound_numbers(
                    p.full_name, values, ctypes.c_int64 if p.what == "strides" else ctypes.c_int32
                )

    def _bind_outputs(
        self, outputs: Sequence[bytearray], dtypes: Sequence[mx.Dtype], init_value: float | None
    ) -> Iterator[_Bound]:
        for name, memory, dtype in zip(self.output_names, outputs, dtypes, strict=True):
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) if memory else 0
            buffer = _Buffer(address, len(memory), element=_element(dtype))
            buffer.role = _OUTPUT if init_value is None else _MUTABLE
            buffer.must_be_written = init_value is None and name not in self.partial_outputs
            yield _Bound(name, buffer, memory)

    def _launch(
        self, kernel: Kernel, bound: Sequence[_Bound], grid: Sequence[int], threads: Sequence[int]
    ) -> Traffic:
        if len(bound) > _MAX_BUFFERS:
            raise ValueError(f"[metal_kernel] expected at most {_MAX_BUFFERS} buffers, got {len(bound)}")
        path = build.library(program(kernel), self.mode)
        code = _code(path, self.mode)
        buffers = (_Buffer * len(bound))(*(b.buffer for b in bound))
        pointers = (ctypes.c_void_p * len(bound))()
        size = ctypes.c_uint64()
        image = code.msim_image(ctypes.byref(size))
        launch = _Launch(
            kernel=ctypes.cast(code.msim_entry, ctypes.c_void_p),
            buffer=ctypes.addressof(buffers),
            pointers=ctypes.addressof(pointers),
            image=image,
            image_bytes=size.value,
            seconds=self.time_limit,
            grid=tuple(grid),
            threads=tuple(threads),
            buffers=len(bound),
            seed=self.seed,
        )
        report, names = Report(), [b.name for b in bound]
        if _runtime(self.mode).msim_run(ctypes.byref(launch), ctypes.byref(report)):
            where = Where(self.name, path, image, grid, threads, names, author_lines(kernel))
            raise fault(report, where, self.time_limit)
        read, fetched, written, loads = (
            {name: int(getattr(buffer, counter)) for name, buffer in zip(names, buffers, strict=True)}
            for counter in ("read", "fetched", "written", "loads")
        )
        return Traffic(read, fetched, written, loads, int(launch.simd_operations), int(launch.barriers))


def _room(size: int, dtype: mx.Dtype, init_value: float | None) -> bytearray:
    """Memory for an output of ``size`` elements."""
    if init_value is None:
        return bytearray(size * dtype.size)
    return bytearray(_memory(mx.full((size,), init_value, dtype).view(mx.uint8)))


def _array(memory: bytearray, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    if not memory:
        return mx.zeros(shape, dtype)
    return mx.array(cast(Any, memoryview(memory))).view(dtype).reshape(shape)


@cache
def _runtime(mode: str) -> ctypes.PyDLL:
    """The simulator. As PyDLL, a call keeps the interpreter's lock: it runs one dispatch at a time."""
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    return ctypes.PyDLL(str(build.runtime(mode)))


@cache
def _code(path: Path, mode: str) -> ctypes.PyDLL:
    """A compiled kernel; it stays loaded."""
    _runtime(mode)
    code = ctypes.PyDLL(str(path))
    code.msim_image.restype = ctypes.c_void_p
    return code


def _checked(grid: Sequence[int], threadgroup: Sequence[int]) -> list[int]:
    for what, sizes in (("grid", grid), ("threadgroup", threadgroup)):
        if len(sizes) != 3 or any(type(s) is not int or s < 1 for s in sizes):
            raise ValueError(f"[metal_kernel] expected a {what} of three positive whole numbers, got {sizes}")
    if prod(threadgroup) > _MAX_THREADS:
        raise ValueError(
            f"[metal_kernel] expected at most {_MAX_THREADS} threads a threadgroup, got {threadgroup}"
        )
    return [min(t, g) for t, g in zip(threadgroup, grid, strict=True)]


def _memory(array: mx.array) -> memoryview:
    return memoryview(cast(Any, array))


def _strides(array: mx.array) -> list[int]:
    return [s // array.itemsize for s in (_memory(array).strides or ())]


def _bound_numbers(name: str, values: Sequence[int], kind: type[ctypes.c_int32 | ctypes.c_int64]) -> _Bound:
    memory = (kind * len(values))(*values)
    size = ctypes.sizeof(memory)
    return _Bound(name, _Buffer(ctypes.addressof(memory), size, element=ctypes.sizeof(kind)), memory)


def _bound_array(name: str, array: mx.array, role: int) -> _Bound:
    element = _element(array.dtype)
    if not array.size:
        return _Bound(name, _Buffer(element=element, role=role), None)
    view = _memory(array)
    size = array.itemsize
    for stride, length in zip(view.strides or (), array.shape, strict=True):
        if stride * (length - 1) < 0:
            raise ValueError(f"[metal_kernel] expected no negative strides, got {view.strides} for {name}")
        size += stride * (length - 1)
    address, keep = _address(view), (array, view)
    if address % _ALIGNED and role == _INPUT:  # on a CPU MLX puts a size of 8 bytes before an array
        memory = (ctypes.c_char * (size + _ALIGNED))()
        aligned = ctypes.addressof(memory) + -ctypes.addressof(memory) % _ALIGNED
        ctypes.memmove(aligned, address, size)
        return _Bound(name, _Buffer(aligned, size, element=element, role=role), memory)
    return _Bound(name, _Buffer(address, size, element=element, role=role), keep)


class _PyBuffer(ctypes.Structure):
    """The start of CPython's Py_buffer, with room for the rest."""

    _fields_ = (("buf", ctypes.c_void_p), ("rest", ctypes.c_char * 120))


def _address(view: memoryview) -> int:
    """Where the memory lies: ctypes gives that only for memory that may be written to."""
    buffer = _PyBuffer()
    full_with_strides = 0x0018
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), full_with_strides)
    address = int(buffer.buf or 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address


metal_kernel = MetalKernel  # by the name that MLX has for it
