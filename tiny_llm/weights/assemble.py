"""Makes the entries of a checkpoint from its stored tensors, in the order that costs least memory and time.

Owns reading order, casting and quantizing on the way. Trusts its caller, who has compared what is stored
with what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from tiny_llm.config import Quantization
from tiny_llm.data import Matrix, QuantizedTensor
from tiny_llm.families.family import AS_WANTED, Stored
from tiny_llm.weights.gguf.blocks import BITS, unpack
from tiny_llm.weights.header import StoredTensor
from tiny_llm.weights.quantize import ROUTERS, combined, dequantized, joined, made, quantize_matrix, stacked
from tiny_llm.weights.reader import Piece, read_ahead

LARGE_PART = 1 / 20  # from this part of all weights on, it matters to memory when an entry is read
KEPT_PART = 1 / 50  # as much of all bytes to be read MLX may keep of buffers that sources were in
BLOCK_BYTES = 2**23  # as much of a float matrix is read at a time where it is to be quantized
UNPACK_BYTES = 2**20  # and as much of GGUF's blocks: what is made of them on the way is ten times as large

Progress = Callable[[int, int], None]
Finish = Callable[[Matrix], Matrix]


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the result: the tensors that it is made of, and how.

    Each of ``parts`` is one stored tensor or several to be stacked: floats, quantized now where ``quantize``
    says so, or GGUF's blocks; or packed values, scales and biases that are ``stored_as`` a format. ``place``
    says which of their rows, in which order.
    """

    name: str
    parts: Sequence[Sequence[StoredTensor]]
    stored_as: Quantization | None
    quantize: Quantization | None
    place: Stored = AS_WANTED

    @property
    def is_foreign(self) -> bool:
        """Whether it is packed in another way than MLX's affine one."""
        return self.stored_as is not None and self.stored_as.method != "affine"

    @property
    def nbytes(self) -> int:
        """Bytes to be read."""
        tensors = [tensor for part in self.parts for tensor in part]
        return sum(_bytes(tensor, rows) for tensor in tensors for rows in _blocks(self, tensor))


def assemble(
    entries: Sequence[Entry], dtype: mx.Dtype | None, finish: Finish, progress: Progress | None
) -> Iterator[tuple[str, Matrix]]:
    """Yield each entry's name and what ``finish`` made of it; floats are cast to ``dtype`` first."""
    done, total = 0, sum(entry.nbytes for entry in entries)
    entries = sorted(entries, key=lambda entry: _place(entry, total))
    with ExitStack() as stack:
        stack.callback(mx.set_cache_limit, mx.set_cache_limit(int(total * KEPT_PART)))
        paths = {tensor.path for entry in entries for part in entry.parts for tensor in part}
        files = {path: stack.enter_context(path.open("rb", buffering=0)) for path in paths}
        pieces = (
            Piece(files[tensor.path], tensor, rows)
            for entry in entries
            for part in entry.parts
            for tensor in part
            for rows in _blocks(entry, tensor)
        )
        arrays = (_cast(array, dtype) for array in read_ahead(pieces))
        for entry in entries:
            yield entry.name, finish(_of_dtype(_made(entry, arrays), dtype))
            done += entry.nbytes
            if progress is not None:
                progress(done, total)


def _place(entry: Entry, total: int) -> tuple[int, Path, int]:
    """Large ones first: their source is then in memory while little else is. The others as they lie on
    disk, which is read fastest from one end to the other.
    """
    first = entry.parts[0][0]
    large = entry.nbytes > total * LARGE_PART
    return -entry.nbytes if large else 0, first.path, first.start


def _blocks(entry: Entry, tensor: StoredTensor) -> list[range] | list[None]:
    """The rows to read at a time: all that are wanted, or few where no more of what they are made of shall
    be in memory; None is the whole tensor, of which rows may be taken later. Of a stack it is some of its
    matrices at a time where rows of each are wanted.
    """
    wanted, shape = entry.place.rows, tensor.shape
    in_blocks = tensor.dtype in BITS
    as_it_is = entry.quantize is None and not in_blocks
    is_stack = len(shape) > 2
    whole = entry.is_foreign or entry.place.transposed or (is_stack and not wanted and not in_blocks)
    if whole or (wanted is None and as_it_is):
        return [None]
    first, end = (0, shape[0]) if is_stack or not wanted else wanted
    if as_it_is and not is_stack:
        return [range(first, end)]
    at_once = UNPACK_BYTES if in_blocks else BLOCK_BYTES
    count = max(1, shape[0] * at_once // max(tensor.nbytes, 1))
    return [range(start, min(start + count, end)) for start in range(first, end, count)]


def _bytes(tensor: StoredTensor, rows: range | None) -> int:
    return tensor.nbytes if rows is None else tensor.nbytes * len(rows) // tensor.shape[0]


def _made(entry: Entry, arrays: Iterator[mx.array]) -> Matrix:
    """Take the entry's arrays and make it, evaluated, so that its sources can go."""
    whole = _packed(entry, entry.stored_as, arrays) if entry.stored_as else _stacked(entry, arrays, 0)
    order, plus = entry.place.order, entry.place.plus
    if entry.place.flat:
        whole = combined([whole], lambda arrays: arrays[0].reshape(-1))
    if order:
        whole = combined([whole], lambda arrays: _ordered(arrays[0], order))
    return combined([whole], lambda arrays: arrays[0].astype(mx.float32) + plus) if plus else whole


def _packed(entry: Entry, format: Quantization, arrays: Iterator[mx.array]) -> Matrix:
    """What is packed already. In foreign formats rows lie where no row can be read by itself."""
    if entry.is_foreign:
        read = [[next(arrays) for _ in part] for part in entry.parts]
        whole = stacked([made(of_one, format, entry.name) for of_one in zip(*read, strict=True)])
        rows = entry.place.rows
        whole = whole if rows is None else combined([whole], lambda arrays: _rows(arrays[0], rows))
    else:
        parts = [_stacked(entry, arrays, number) for number in range(3)]
        packed, scales, biases = (part for part in parts if isinstance(part, mx.array))
        whole = QuantizedTensor(packed, scales, biases, format.group_size, format.bits)
    is_router = entry.name.endswith(ROUTERS)
    return dequantized(whole) if is_router and isinstance(whole, QuantizedTensor) else whole


def _stacked(entry: Entry, arrays: Iterator[mx.array], part: int) -> Matrix:
    return stacked([_wanted(entry, tensor, arrays) for tensor in entry.parts[part]])


def _rows(array: mx.array, rows: tuple[int, int]) -> mx.array:
    return mx.take(array, mx.arange(*rows), axis=-2 if array.ndim > 1 else 0)


def _wanted(entry: Entry, tensor: StoredTensor, arrays: Iterator[mx.array]) -> Matrix:
    """What the entry takes of one stored tensor, evaluated."""
    place = entry.place
    blocks: list[Matrix] = []
    for read in _blocks(entry, tensor):
        array = next(arrays)
        if place.transposed and array.ndim == 2:
            array = mx.contiguous(array.T)
        if place.rows is not None and (read is None or array.ndim > 2):
            array = _rows(array, place.rows)
        mx.eval(array)
        if tensor.dtype in BITS:
            blocks.append(unpack(tensor.dtype, array))
        else:
            blocks.append(array if entry.quantize is None else quantize_matrix(array, entry.quantize))
    return joined(blocks)


def _ordered(array: mx.array, order: Sequence[int]) -> mx.array:
    """Of each ``len(order)`` rows number i is what was number ``order[i]``."""
    heads = array.reshape(-1, len(order), *array.shape[1:])
    return heads[:, mx.array(list(order))].reshape(array.shape)


def _of_dtype(matrix: Matrix, dtype: mx.Dtype | None) -> Matrix:
    """What was made here is cast, too, scales and biases as well; but float32 is to stay that."""
    if dtype is None or (isinstance(matrix, mx.array) and matrix.dtype == mx.float32):
        return matrix
    return combined([matrix], lambda arrays: _cast(arrays[0], dtype))


def _cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    is_float = mx.issubdtype(array.dtype, mx.floating)
    return array.astype(dtype) if dtype is not None and is_float else array
