"""Reads and checks the header of a safetensors file, before anything else touches the file.

Owns the file format: 8 bytes of little-endian header length, a JSON table of tensors, then
their data, back to back. Refuses to know what the tensors are for. A flipped bit in the *data*
cannot be seen here or anywhere else: the format carries no checksum.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tiny_llm.errors import WeightError

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: that, its word for the dtype, the shape, the bytes and where they begin."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor that the file holds, by name, once the whole table has been checked.

    Raises WeightError, naming file and tensor, for a file that is truncated or too long, a table
    that is not valid JSON, an unknown dtype, a shape that does not match its bytes, or data
    that overlaps or leaves a hole.
    """
    try:
        text, data_start, data_bytes = _read_table(path)
        table = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except OSError as error:
        raise WeightError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, "its table of tensors is not valid JSON") from error
    if not isinstance(table, dict):
        raise _corrupt(path, "its table of tensors is not a JSON object")
    _check_metadata(path, table.pop(METADATA, {}))
    tensors = {name: _tensor(path, name, row, data_start) for name, row in table.items()}
    _check_layout(path, tensors, data_start, data_bytes)
    return tensors


def _corrupt(path: Path, what: str) -> WeightError:
    return WeightError(f"{path} is corrupt: {what}. Download or copy the file again.")


def _read_table(path: Path) -> tuple[str, int, int]:
    """Return the JSON text, where the data after it begins, and the data's size."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES:
            raise _corrupt(path, f"it has {size} bytes and a safetensors file starts with {LENGTH_BYTES}")
        if length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
            raise _corrupt(path, f"its header claims {length} bytes and the file has {size}")
        raw = file.read(length)
    start = LENGTH_BYTES + length
    return raw.decode("utf-8"), start, size - start


def _unique(path: Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise _corrupt(path, f"its header has {twice!r} twice")
    return table


def _check_metadata(path: Path, metadata: object) -> None:
    if metadata is None:  # so MLX writes none at all
        return
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _corrupt(path, f"{METADATA} must map names to strings")


def _tensor(path: Path, name: str, row: object, data_start: int) -> StoredTensor:
    """Check one row of the table by itself."""
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(path, f"tensor {name!r} needs dtype, shape and data_offsets, but has {row!r:.80}")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _corrupt(path, f"tensor {name!r} has the unknown dtype {dtype!r:.40}")
    if not _whole_numbers(shape):
        raise _corrupt(path, f"tensor {name!r} has the impossible shape {shape!r:.80}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _corrupt(path, f"tensor {name!r} has the impossible data_offsets {offsets!r:.80}")
    start, end = offsets
    if math.prod(shape) * DTYPE_BITS[dtype] != (end - start) * 8:
        raise _corrupt(path, f"tensor {name!r}, {dtype} {shape}, does not fill its {end - start} bytes")
    return StoredTensor(path, dtype, tuple(shape), end - start, data_start + start)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(path: Path, tensors: Mapping[str, StoredTensor], data_start: int, data_bytes: int) -> None:
    """The data must be back to back and end with the file, so that no byte is used twice or hidden."""
    reached = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        start = info.start - data_start
        if start != reached:
            what = "overlaps the one before" if start < reached else "leaves a hole before it"
            raise _corrupt(path, f"tensor {name!r} {what}: it starts at {start}, not {reached}")
        reached = start + info.nbytes
        if reached > data_bytes:
            raise _corrupt(
                path, f"it is truncated: tensor {name!r} ends at {reached} of {data_bytes} data bytes"
            )
    if reached != data_bytes:
        raise _corrupt(path, f"its tensors end at {reached}, but it has {data_bytes} data bytes")
