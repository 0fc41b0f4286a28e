"""Reading one tensor of a file, or some of its rows, as MLX itself reads it."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.errors import WeightError
from tiny_llm.weights.header import read_header
from tiny_llm.weights.reader import read_tensor

TENSORS = {
    "words": mx.arange(12, dtype=mx.uint32).reshape(4, 3),
    "float": mx.random.normal((5, 2, 3), key=mx.random.key(0)),
    "bfloat": mx.random.normal((7, 3), key=mx.random.key(1)).astype(mx.bfloat16),
    "half": mx.random.normal((1,), key=mx.random.key(2)).astype(mx.float16),
    "scalar": mx.array(2.5),
    "empty": mx.zeros((0, 8)),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    mx.save_safetensors(str(tmp_path / "x.safetensors"), TENSORS)
    return tmp_path / "x.safetensors"


def test_whole_tensors(path: Path) -> None:
    header = read_header(path)
    with path.open("rb", buffering=0) as file:
        for name, expected in TENSORS.items():
            got = read_tensor(file, header[name])
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
            assert mx.array_equal(got, expected), name


@pytest.mark.parametrize("rows", [range(4), range(1), range(1, 3), range(3, 4), range(2, 2)])
def test_some_rows(path: Path, rows: range) -> None:
    header = read_header(path)
    with path.open("rb", buffering=0) as file:
        for name in ("words", "float", "bfloat"):
            got = read_tensor(file, header[name], rows)
            assert mx.array_equal(got, TENSORS[name][rows.start : rows.stop]), name


def test_a_file_that_shrinks_meanwhile(path: Path) -> None:
    header = read_header(path)
    last = max(header.values(), key=lambda info: info.start + info.nbytes)
    with path.open("rb", buffering=0) as file:
        os.truncate(path, last.start + 1)
        with pytest.raises(WeightError, match=r"x\.safetensors became shorter while it was read"):
            read_tensor(file, last)
