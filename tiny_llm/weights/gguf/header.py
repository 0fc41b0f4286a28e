"""Reads and checks the header of a GGUF file, before anything else touches the file.

Owns the file format: magic, version and counts; metadata; a table of tensors; their data, one behind the
other, each padded to the alignment. Nothing is believed that the file's length does not allow. Refuses to
know what keys and tensors are for.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path

from tiny_llm.errors import WeightError
from tiny_llm.weights.header import StoredTensor

BLOCKS: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 8: ("Q8_0", 32, 34),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
}  # fmt: skip
"""The tensor types that are read, by their number: name, values of a block, bytes of a block."""
OTHERS: Mapping[int, str] = {
    10: "Q2_K", 11: "Q3_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
NUMBERS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
TEXT, ARRAY = 8, 9
GGUF = ".gguf"
VERSIONS = (2, 3)
MAX_ITEMS = 2**21  # in all arrays together: the largest vocabularies have some 800,000 tokens and merges
MAX_TEXT = 2**24  # bytes: the longest are chat templates
MAX_DIMS = 4


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says of itself, and where its tensors lie; a shape's last axis is the contiguous one."""

    path: Path
    metadata: Mapping[str, object]
    tensors: Mapping[str, StoredTensor]


def read_gguf(path: Path) -> GgufHeader:
    """Return the header once all of it has been checked.

    Raises WeightError, naming the file, for one that is no GGUF file, of another version, truncated, too long
    or damaged, or that has a tensor of a type that is not read.
    """
    try:
        with path.open("rb") as file:
            return _HeaderReader(path, file).header()
    except OSError as error:
        raise WeightError(f"{path} cannot be read: {error.strerror or error}.") from error


class _HeaderReader:
    """The file from front to back; what is taken is there."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self._path, self._file = path, file
        self._size = self._left = file.seek(0, 2)
        self._items = MAX_ITEMS
        file.seek(0)

    def header(self) -> GgufHeader:
        if self._take(4) != b"GGUF":
            raise WeightError(f"{self._path} is no GGUF file: it does not begin with those four letters.")
        version = self._whole("I")
        if version not in VERSIONS:
            raise WeightError(f"{self._path} is of GGUF version {version}, expected 2 or 3, little-endian.")
        tensors, keys = self._whole("Q"), self._whole("Q")
        metadata: dict[str, object] = {}
        for _ in range(keys):
            self._once(name := self._text(), metadata)
            metadata[name] = self._value(self._whole("I"))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment & 7 or not 0 < alignment <= 2**20:
            raise self._corrupt(f"its alignment is {alignment!r:.40}")
        rows: dict[str, StoredTensor] = {}
        for _ in range(tensors):
            self._once(name := self._text(), rows)
            rows[name] = self._tensor(name)
        start = _padded(self._size - self._left, alignment)
        return GgufHeader(self._path, metadata, self._placed(rows, start, alignment))

    def _tensor(self, name: str) -> StoredTensor:
        """A row of the table; ``start`` is still from where the data begins."""
        count = self._whole("I")
        if not 1 <= count <= MAX_DIMS:
            raise self._corrupt(f"tensor {name!r:.80} has {count} dimensions")
        shape = tuple(self._whole("Q") for _ in range(count))[::-1]
        number, start = self._whole("I"), self._whole("Q")
        if number not in BLOCKS:
            raise WeightError(
                f"{self._path}: tensor {name!r:.80} is {OTHERS.get(number, f'of type {number}')}, which is "
                f"not read. Take a file with {', '.join(kind for kind, _, _ in BLOCKS.values())} only."
            )
        kind, values, nbytes = BLOCKS[number]
        if not math.prod(shape) or shape[-1] % values:
            raise self._corrupt(f"tensor {name!r:.80}, {kind}, has the impossible shape {list(shape)}")
        return StoredTensor(self._path, kind, shape, math.prod(shape) // values * nbytes, start)

    def _placed(
        self, rows: Mapping[str, StoredTensor], start: int, alignment: int
    ) -> dict[str, StoredTensor]:
        """The tensors where they lie: one behind the other, the last one up to the end of the file."""
        placed: dict[str, StoredTensor] = {}
        reached = end = 0
        for name, info in sorted(rows.items(), key=lambda item: item[1].start):
            if info.start != reached:
                raise self._corrupt(f"tensor {name!r:.80} starts at {info.start}, expected {reached}")
            placed[name] = replace(info, start=start + info.start)
            end = start + info.start + info.nbytes
            reached = _padded(info.start + info.nbytes, alignment)
        if not end <= self._size <= start + reached:
            raise self._corrupt(f"its tensors end at {end}, and it has {self._size} bytes")
        return placed

    def _value(self, kind: int) -> object:
        if kind in NUMBERS:
            return self._numbers(NUMBERS[kind], 1)[0]
        if kind == TEXT:
            return self._text()
        if kind != ARRAY:
            raise self._corrupt(f"its metadata has a value of type {kind}")
        kind, count = self._whole("I"), self._whole("Q")
        self._items -= count
        if self._items < 0:
            raise self._corrupt(f"its metadata has an array of {count} items")
        if kind in NUMBERS:
            return list(self._numbers(NUMBERS[kind], count))
        if kind != TEXT:
            raise self._corrupt(f"its metadata has an array of type {kind}")
        return [self._text() for _ in range(count)]

    def _text(self) -> str:
        length = self._whole("Q")
        if length > MAX_TEXT:
            raise self._corrupt(f"its header has a text of {length} bytes")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self._corrupt("its header has a text that is not UTF-8") from None

    def _whole(self, code: str) -> int:
        return int(self._numbers(code, 1)[0])

    def _numbers(self, code: str, count: int) -> tuple[float, ...]:
        return struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(f"<{code}")))

    def _take(self, count: int) -> bytes:
        self._left -= count
        if self._left < 0:
            raise self._corrupt(f"its header goes beyond its {self._size} bytes")
        return self._file.read(count)

    def _once(self, name: str, names: Mapping[str, object]) -> None:
        if name in names:
            raise self._corrupt(f"its header has {name!r:.80} twice")

    def _corrupt(self, what: str) -> WeightError:
        return WeightError(f"{self._path} is corrupt: {what}. Download or copy the file again.")


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
