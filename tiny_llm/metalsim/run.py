"""``metal_kernel``: the call of ``mx.fast.metal_kernel``, run here. Owns arrays in and out, and one dispatch.

It is eager: inputs are evaluated, the kernel runs, and arrays come back. Knows no op.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from tiny_llm.errors import ConfigError
from tiny_llm.metalsim import build
from tiny_llm.metalsim.faults import Report, Where, fault
from tiny_llm.metalsim.source import Input, Kernel, Template, author_lines, program

Array = mx.array | bool | int | float
_MAX_THREADS = 1024
_MAX_BUFFERS = 96
_INPUT, _OUTPUT, _MUTABLE = 0, 1, 2
_ALIGNED = 16  # bytes that are loaded at once, at most, and on a GPU a buffer begins at more


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("read", ctypes.c_uint64),
        ("written", ctypes.c_uint64),
        ("fetched", ctypes.c_uint64),
        ("loads", ctypes.c_uint64),
        ("element", ctypes.c_uint32),
        ("role", ctypes.c_uint32),
        ("must_be_written", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("buffer", ctypes.c_void_p),
        ("pointers", ctypes.c_void_p),
        ("image", ctypes.c_void_p),
        ("image_bytes", ctypes.c_uint64),
        ("simd_operations", ctypes.c_uint64),
        ("barriers", ctypes.c_uint64),
        ("seconds", ctypes.c_double),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("buffers", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
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


@dataclass
class _Bound:
    """A buffer of the dispatch: its name, its memory, and who keeps that alive."""

    name: str
    address: int
    size: int
    element: int
    role: int
    must_be_written: bool = False
    keep: object = None


@cache
def _dtypes() -> dict[mx.Dtype, str]:
    """Metal's name of each dtype that it has."""
    return {
        mx.bool_: "bool",
        mx.int8: "int8_t",
        mx.int16: "int16_t",
        mx.int32: "int32_t",
        mx.int64: "int64_t",
        mx.uint8: "uint8_t",
        mx.uint16: "uint16_t",
        mx.uint32: "uint32_t",
        mx.uint64: "uint64_t",
        mx.float16: "float16_t",
        mx.bfloat16: "bfloat16_t",
        mx.float32: "float",
        mx.complex64: "complex64_t",
    }


def _element(dtype: mx.Dtype) -> int:
    """Bytes of what the checker counts as one; a complex number is two."""
    return dtype.size // 2 if dtype == mx.complex64 else dtype.size


def _metal(dtype: mx.Dtype) -> str:
    if dtype not in _dtypes():
        raise ConfigError(f"Metal has no {dtype}; give one of {', '.join(map(str, _dtypes()))}.")
    return _dtypes()[dtype]


@dataclass(frozen=True)
class MetalKernel:
    """A kernel to be called as the one that ``mx.fast.metal_kernel`` returns."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False
    mode: str = "strict"
    seed: int = 1
    partial_outputs: tuple[str, ...] = ()
    mutable_inputs: tuple[str, ...] = ()
    time_limit: float = 60.0

    def __call__(
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
        stream: object = None,
    ) -> list[mx.array]:
        """Run the kernel; return its outputs. Raises KernelFault, CompileError, ConfigError, ValueError."""
        arrays = self._inputs(inputs)
        kernel = self.variant(arrays, output_dtypes, template or ())
        if verbose:
            print(f"Generated source code for `{self.name}`:\n```\n{kernel.text}\n```")
        return self._run(kernel, arrays, output_shapes, output_dtypes, grid, threadgroup, init_value)[0]

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
    ) -> tuple[list[mx.array], Traffic]:
        """As a call, with what the dispatch read and wrote."""
        arrays = self._inputs(inputs)
        kernel = self.variant(arrays, output_dtypes, template or ())
        return self._run(kernel, arrays, output_shapes, output_dtypes, grid, threadgroup, init_value)

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
        arguments: list[Template] = []
        for name, value in template:
            arguments.append((name, _metal(value) if isinstance(value, mx.Dtype) else value))
        given = []
        for name, array in zip(self.input_names, inputs, strict=True):
            given.append(Input(name, _metal(array.dtype), array.size, array.ndim))
        outputs = []
        for name, dtype in zip(self.output_names, output_dtypes, strict=True):
            outputs.append((name, _metal(dtype)))
        return Kernel(
            self.name,
            self.header,
            self.source,
            tuple(given),
            tuple(outputs),
            tuple(arguments),
            self.atomic_outputs,
        )

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

    def _run(
        self,
        kernel: Kernel,
        inputs: Sequence[mx.array],
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        init_value: float | None,
    ) -> tuple[list[mx.array], Traffic]:
        threads = _checked(grid, threadgroup)
        outputs = [_Output.of(tuple(s), d, init_value) for s, d in zip(shapes, dtypes, strict=True)]
        bound = [*self._bind(kernel, inputs), *self._bind_outputs(outputs, init_value)]
        traffic = self._launch(kernel, bound, grid, threads)
        return [output.array() for output in outputs], traffic

    def _bind(self, kernel: Kernel, inputs: Sequence[mx.array]) -> Iterator[_Bound]:
        arrays = dict(zip(self.input_names, inputs, strict=True))
        for p in kernel.parameters:
            array = arrays.get(p.name)
            if p.what == "output" or array is None:
                continue
            if p.what == "data":
                role = _MUTABLE if p.name in self.mutable_inputs else _INPUT
                yield _bound_array(p.name, array, role)
            else:
                values = {"shape": array.shape, "strides": _strides(array), "ndim": (array.ndim,)}[p.what]
                width = ctypes.c_int64 if p.what == "strides" else ctypes.c_int32
                memory = (width * len(values))(*values)
                size = ctypes.sizeof(memory)
                yield _Bound(
                    f"{p.name}_{p.what}",
                    ctypes.addressof(memory),
                    size,
                    ctypes.sizeof(width),
                    _INPUT,
                    keep=memory,
                )

    def _bind_outputs(self, outputs: Sequence[_Output], init_value: float | None) -> Iterator[_Bound]:
        for name, output in zip(self.output_names, outputs, strict=True):
            element = _element(output.dtype)
            must = init_value is None and name not in self.partial_outputs
            role = _OUTPUT if init_value is None else _MUTABLE
            yield _Bound(name, output.address, len(output.memory), element, role, must, output)

    def _launch(
        self, kernel: Kernel, bound: Sequence[_Bound], grid: Sequence[int], threads: Sequence[int]
    ) -> Traffic:
        if len(bound) > _MAX_BUFFERS:
            raise ValueError(f"[metal_kernel] expected at most {_MAX_BUFFERS} buffers, got {len(bound)}")
        path = build.library(program(kernel), self.mode)
        code = _code(path, self.mode)
        buffers = (_Buffer * len(bound))()
        for buffer, b in zip(buffers, bound, strict=True):
            buffer.data, buffer.bytes, buffer.element = b.address, b.size, b.element
            buffer.role, buffer.must_be_written = b.role, b.must_be_written
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
        return Traffic(
            {name: int(b.read) for name, b in zip(names, buffers, strict=True)},
            {name: int(b.fetched) for name, b in zip(names, buffers, strict=True)},
            {name: int(b.written) for name, b in zip(names, buffers, strict=True)},
            {name: int(b.loads) for name, b in zip(names, buffers, strict=True)},
            int(launch.simd_operations),
            int(launch.barriers),
        )


@dataclass(frozen=True)
class _Output:
    """Memory for one output, to become an array."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    memory: bytearray

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: mx.Dtype, init_value: float | None) -> _Output:
        _metal(dtype)
        if init_value is None:
            return cls(shape, dtype, bytearray(prod(shape) * dtype.size))
        filled = mx.full((prod(shape),), init_value, dtype)
        return cls(shape, dtype, bytearray(_memory(filled.view(mx.uint8))))

    @property
    def address(self) -> int:
        if not self.memory:
            return 0
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def array(self) -> mx.array:
        if not self.memory:
            return mx.zeros(self.shape, self.dtype)
        return mx.array(cast(Any, memoryview(self.memory))).view(self.dtype).reshape(self.shape)


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


def _bound_array(name: str, array: mx.array, role: int) -> _Bound:
    element = _element(array.dtype)
    if not array.size:
        return _Bound(name, 0, 0, element, role)
    view = _memory(array)
    size = array.itemsize
    for stride, length in zip(view.strides or (), array.shape, strict=True):
        if stride * (length - 1) < 0:
            raise ValueError(f"[metal_kernel] expected no negative strides, got {view.strides} for {name}")
        size += stride * (length - 1)
    address = _address(view)
    if address % _ALIGNED and role == _INPUT:  # on a CPU MLX puts a size of 8 bytes before an array
        memory = (ctypes.c_char * (size + _ALIGNED))()
        start = -ctypes.addressof(memory) % _ALIGNED
        ctypes.memmove(ctypes.addressof(memory) + start, address, size)
        return _Bound(name, ctypes.addressof(memory) + start, size, element, role, keep=memory)
    return _Bound(name, address, size, element, role, keep=(array, view))


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


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: object = None,
    *,
    mode: str = "strict",
    seed: int = 1,
    partial_outputs: Sequence[str] = (),
    mutable_inputs: Sequence[str] = (),
    time_limit: float = 60.0,
) -> MetalKernel:
    """A kernel as ``mx.fast.metal_kernel`` makes it, to be run here.

    ``mode`` "strict" checks every access, "fast" none. ``seed`` decides the order of threads in "strict".
    ``partial_outputs`` may be left unwritten; ``mutable_inputs`` may be written, and are changed in place.
    """
    if mode not in build.MODES:
        raise ConfigError(f"mode is {mode!r}, expected one of {', '.join(build.MODES)}.")
    if not output_names:
        raise ValueError("[metal_kernel] expected at least one output, got none")
    return MetalKernel(
        name,
        tuple(input_names),
        tuple(output_names),
        source,
        header,
        ensure_row_contiguous,
        atomic_outputs,
        mode,
        seed,
        tuple(partial_outputs),
        tuple(mutable_inputs),
        time_limit,
    )
