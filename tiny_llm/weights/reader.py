"""A stored tensor, or some of its rows, as an array. Owns the way from a file's bytes to an array.

Trusts the header, which was checked. Bytes are read where the array lies: nothing is held twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import FileIO

import mlx.core as mx

from tiny_llm.errors import WeightError
from tiny_llm.weights.header import TensorInfo

DTYPES: Mapping[str, mx.Dtype] = {
    "F32": mx.float32,
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "U32": mx.uint32,
}


def read_tensor(file: FileIO, info: TensorInfo, rows: range | None = None) -> mx.array:
    """Read the tensor, or only ``rows`` of its first axis, in its stored dtype (one of DTYPES).

    Raises WeightError if the file ends before the tensor, having changed since its header was read.
    """
    shape, start = info.shape, info.start
    if rows is not None:
        shape, start = (len(rows), *shape[1:]), start + rows.start * info.nbytes // max(shape[0], 1)
    words = mx.zeros(math.prod(shape), mx.uint16 if DTYPES[info.dtype].size == 2 else mx.uint32)
    mx.eval(words)
    if words.size:
        _fill(file, start, memoryview(words).cast("B"))  # type: ignore[arg-type]  # MLX's stubs lack it
    return words.view(DTYPES[info.dtype]).reshape(shape)


def _fill(file: FileIO, start: int, space: memoryview) -> None:
    file.seek(start)
    while space:
        count = file.readinto(space)
        if not count:
            raise WeightError(f"{file.name} became shorter while it was read. Copy or download it again.")
        space = space[count:]
