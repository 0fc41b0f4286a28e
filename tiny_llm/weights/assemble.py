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
from tiny_llm.weights.quantize import joined, quantize_matrix
from tiny_llm.weights.reader import Piece, read_ahead
from tiny_llm.weights.shards import StoredTensor

LARGE_PART = 1 / 20
"""From this part of all weights on, it matters to memory when an entry is read."""
BLOCK_BYTES = 2**23
"""As much of a float matrix is read at a time where it is to be quantized."""

Progress = Callable[[int, int], None]
Finish = Callable[[Matrix], Matrix]


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the result: the tensors that it is made of, and how.

    One tensor, quantized now where ``quantize`` says so; or packed values, scales and biases that are
    ``stored_as`` a format.
    """

    name: str
    parts: Sequence[StoredTensor]
    stored_as: Quantization | None
    quantize: Quantization | None

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(part.info.nbytes for part in self.parts)


def assemble(
    entries: Sequence[Entry], dtype: mx.Dtype | None, finish: Finish, progress: Progress | None
) -> Iterator[tuple[str, Matrix]]:
    """Yield each entry's name and what ``finish`` made of it; floats are cast to ``dtype`` first."""
    done, total = 0, sum(entry.nbytes for entry in entries)
    entries = sorted(entries, key=lambda entry: _place(entry, total))
    with ExitStack() as stack:
        paths = {part.path for entry in entries for part in entry.parts}
        files = {path: stack.enter_context(path.open("rb", buffering=0)) for path in paths}
        pieces = (
            Piece(files[part.path], part.info, rows)
            for entry in entries
            for part in entry.parts
            for rows in _blocks(entry)
        )
        arrays = (_cast(array, dtype) for array in read_ahead(pieces))
        for entry in entries:
            yield entry.name, finish(_made(entry, arrays))
            done += entry.nbytes
            if progress is not None:
                progress(done, total)


def _place(entry: Entry, total: int) -> tuple[int, Path, int]:
    """Large ones first: their source is then in memory while little else is. The others as they lie on
    disk, which is read fastest from one end to the other.
    """
    first = entry.parts[0]
    large = entry.nbytes > total * LARGE_PART
    return -entry.nbytes if large else 0, first.path, first.info.start


def _blocks(entry: Entry) -> list[range] | list[None]:
    """The rows to read at a time: all, or few where no more of a float matrix shall be in memory."""
    if entry.quantize is None:
        return [None]
    rows = entry.parts[0].info.shape[0]
    count = max(1, rows * BLOCK_BYTES // max(entry.nbytes, 1))
    return [range(start, min(start + count, rows)) for start in range(0, rows, count)]


def _made(entry: Entry, arrays: Iterator[mx.array]) -> Matrix:
    """Take the entry's arrays and make it, evaluated, so that its sources can go."""
    if entry.quantize is not None:
        return joined([quantize_matrix(next(arrays), entry.quantize) for _ in _blocks(entry)])
    parts = [next(arrays) for _ in entry.parts]
    mx.eval(parts)
    if entry.stored_as is None:
        return parts[0]
    return QuantizedTensor(parts[0], parts[1], parts[2], entry.stored_as.group_size, entry.stored_as.bits)


def _cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    is_float = mx.issubdtype(array.dtype, mx.floating)
    return array.astype(dtype) if dtype is not None and is_float else array
