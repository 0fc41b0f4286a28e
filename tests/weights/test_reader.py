"""Reading one tensor of a file, or some of its rows, as MLX itself reads it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.errors import WeightError
from tiny_llm.weights.header import read_header
from tiny_llm.weights.reader import Piece, read_ahead

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


def read(path: Path, rows: dict[str, range | None]) -> dict[str, mx.array]:
    header = read_header(path)
    with path.open("rb", buffering=0) as file:
        pieces = [Piece(file, header[name], some) for name, some in rows.items()]
        return dict(zip(rows, read_ahead(pieces), strict=True))


def test_whole_tensors(path: Path) -> None:
    for name, got in read(path, dict.fromkeys(TENSORS)).items():
        assert (got.dtype, got.shape) == (TENSORS[name].dtype, TENSORS[name].shape), name
        assert mx.array_equal(got, TENSORS[name]), name


@pytest.mark.parametrize("rows", [range(4), range(1), range(1, 3), range(3, 4), range(2, 2)])
def test_some_rows(path: Path, rows: range) -> None:
    for name, got in read(path, dict.fromkeys(("words", "float", "bfloat"), rows)).items():
        assert mx.array_equal(got, TENSORS[name][rows.start : rows.stop]), name


def test_each_is_read_while_the_one_before_is_used(path: Path) -> None:
    """Asked for as few as possible, but one ahead; an array that was given stays as it is."""
    asked: list[str] = []
    header = read_header(path)

    def pieces(file: FileIO) -> Iterator[Piece]:
        for name in TENSORS:
            asked.append(name)
            yield Piece(file, header[name])

    with path.open("rb", buffering=0) as file:
        arrays = read_ahead(pieces(file))
        first = next(arrays)
        assert len(asked) == 2
        rest = list(arrays)
    for got, expected in zip([first, *rest], TENSORS.values(), strict=True):
        assert mx.array_equal(got, expected)


def test_nothing_to_read() -> None:
    assert list(read_ahead([])) == []


def test_a_file_that_shrinks_meanwhile(path: Path) -> None:
    header = read_header(path)
    last = max(header.values(), key=lambda info: info.start + info.nbytes)
    with path.open("rb", buffering=0) as file:
        os.truncate(path, last.start + 1)
        with pytest.raises(WeightError, match=r"x\.safetensors became shorter while it was read"):
            list(read_ahead([Piece(file, last)] * 3))
