"""Stored tensors, or some of their rows, as arrays. Owns the way from a file's bytes to an array.

Trusts the header, which was checked. Bytes are read where the array lies, so nothing is held twice.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO

import mlx.core as mx

from tiny_llm.errors import WeightError
from tiny_llm.weights.header import StoredTensor

DTYPES: Mapping[str, mx.Dtype] = {
    "F32": mx.float32,
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "U8": mx.uint8,
    "U32": mx.uint32,
    "I32": mx.int32,
}
AHEAD_BYTES = 2**27  # how much of a file the system is asked to have ready after what is read


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of an open file, or only ``rows`` of its first axis.

    If its dtype is none of DTYPES, it comes as its bytes: uint8, with a row's in place of its columns.
    """

    file: FileIO
    info: StoredTensor
    rows: range | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is read."""
        shape = self.info.shape
        if self.info.dtype not in DTYPES:
            shape = (*shape[:-1], self.info.nbytes // math.prod(shape[:-1]))
        return shape if self.rows is None else (len(self.rows), *shape[1:])

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of what is read."""
        return DTYPES.get(self.info.dtype, mx.uint8)

    @property
    def start(self) -> int:
        """Where its bytes begin in the file."""
        if self.rows is None:
            return self.info.start
        return self.info.start + self.rows.start * self.info.nbytes // self.info.shape[0]


def read_ahead(pieces: Iterable[Piece]) -> Iterator[mx.array]:
    """Yield each piece's array, in order and in its stored dtype; the next is read meanwhile.

    Raises WeightError if a file ends too early, having changed since its header was read.
    """
    before: tuple[Piece, mx.array, Future[None]] | None = None
    asked: dict[FileIO, int] = {}
    with ThreadPoolExecutor(1, "weights") as reader:
        for piece in pieces:
            words = _room(piece)  # made in this thread, since MLX's streams belong to theirs
            _ask_ahead(piece, asked)
            reading = reader.submit(_fill, piece, words)
            if before is not None:
                yield _finished(*before)
            before = piece, words, reading
        if before is not None:
            yield _finished(*before)


def _room(piece: Piece) -> mx.array:
    word = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[piece.dtype.size]
    words = mx.zeros(math.prod(piece.shape), word)
    mx.eval(words)
    return words


def _ask_ahead(piece: Piece, asked: dict[FileIO, int]) -> None:
    """Have the system read on, so that the disk goes on while a piece is worked on (Linux).

    ``asked``: up to where, of each file.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    end = asked.get(piece.file, 0)
    if not piece.start <= end <= piece.start + AHEAD_BYTES:  # it lies elsewhere than the one before
        end = piece.start
    if end - piece.start < AHEAD_BYTES // 2:
        os.posix_fadvise(piece.file.fileno(), end, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        asked[piece.file] = end + AHEAD_BYTES


def _fill(piece: Piece, words: mx.array) -> None:
    if not words.size:
        return
    space = memoryview(words).cast("B")  # type: ignore[arg-type]  # MLX's stubs lack the protocol
    piece.file.seek(piece.start)
    while space:
        count = piece.file.readinto(space)
        if not count:
            raise WeightError(
                f"{piece.file.name} became shorter while it was read. Copy or download it again."
            )
        space = space[count:]


def _finished(piece: Piece, words: mx.array, reading: Future[None]) -> mx.array:
    reading.result()
    return words.view(piece.dtype).reshape(piece.shape)
