"""The header check: whatever a safetensors file has become, it loads as it was or is refused in one line."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiny_llm.errors import WeightError
from tiny_llm.weights import header
from tiny_llm.weights.header import StoredTensor, read_header

pytestmark = pytest.mark.chapter("1.5")

TENSORS = {"a.weight": mx.arange(6.0).reshape(2, 3), "b.weight": mx.zeros((4,), mx.bfloat16)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), TENSORS, metadata={"format": "mlx"})
    return file


def write(path: Path, table: object, data: bytes = b"", length: int | None = None) -> Path:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def row(dtype: str, shape: object, start: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_names_dtypes_shapes_and_sizes(path):
    data = path.stat().st_size - 32
    assert read_header(path) == {
        "a.weight": StoredTensor(path, "F32", (2, 3), 24, data + 8),
        "b.weight": StoredTensor(path, "BF16", (4,), 8, data),
    }


def test_a_file_saved_by_mlx_without_metadata(tmp_path):
    """It writes null, which no other writer does."""
    mx.save_safetensors(str(tmp_path / "x.safetensors"), TENSORS)
    assert b'"__metadata__":null' in (tmp_path / "x.safetensors").read_bytes()
    assert read_header(tmp_path / "x.safetensors").keys() == TENSORS.keys()


def test_a_scalar_and_an_empty_tensor(tmp_path):
    file = write(tmp_path / "x", {"s": row("F32", [], 0, 4), "e": row("F16", [0, 8], 4, 4)}, b"1234")
    end = file.stat().st_size
    assert read_header(file) == {
        "s": StoredTensor(file, "F32", (), 4, end - 4),
        "e": StoredTensor(file, "F16", (0, 8), 0, end),
    }


GOOD = row("F32", [2], 0, 8)
BAD_TABLES = {
    "not JSON": (b"{not json", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "nested without end": (b"[" * 100_000, "not valid JSON"),
    "a list": ([], "not a JSON object"),
    "a row that is a number": ({"w": 1}, "'w' needs dtype"),
    "a row with a field more": ({"w": GOOD | {"extra": 1}}, "'w' needs dtype"),
    "an unknown dtype": ({"w": GOOD | {"dtype": "F33"}}, "'w' has the unknown dtype"),
    "a dtype that is a list": ({"w": GOOD | {"dtype": []}}, "'w' has the unknown dtype"),
    "a negative size": ({"w": row("F32", [-2], 0, 8)}, "'w' has the impossible shape"),
    "a fractional size": ({"w": row("F32", [2.0], 0, 8)}, "'w' has the impossible shape"),
    "a size that is true": ({"w": row("F32", [2, True], 0, 8)}, "'w' has the impossible shape"),
    "an enormous size": ({"w": row("F32", [2**70, 0], 0, 0)}, "'w' has the impossible shape"),
    "a shape that is a text": ({"w": row("F32", "2", 0, 8)}, "'w' has the impossible shape"),
    "offsets that run backwards": ({"w": row("F32", [2], 8, 0)}, "'w' has the impossible data_offsets"),
    "three offsets": ({"w": GOOD | {"data_offsets": [0, 4, 8]}}, "'w' has the impossible data_offsets"),
    "a shape of other size": ({"w": row("F32", [3], 0, 8)}, "'w', F32 [3], does not fill its 8 bytes"),
    "two at one place": ({"v": GOOD, "w": GOOD}, "overlaps"),
    "a hole": ({"w": row("F32", [2], 4, 12)}, "leaves a hole"),
    "data past the end": ({"w": row("F32", [4], 0, 16)}, "truncated: tensor 'w'"),
    "data that nobody owns": ({"w": row("F32", [1], 0, 4)}, "end at 4"),
    "a name twice": (b'{"w": 1, "w": 2}', "'w' twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "w": GOOD}, "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_refuses(tmp_path, case):
    table, expected = BAD_TABLES[case]
    file = write(tmp_path / "model.safetensors", table, bytes(8))
    with pytest.raises(WeightError) as error:
        read_header(file)
    message = str(error.value)
    assert expected in message and str(file) in message
    assert "\n" not in message and len(message) < 500 + len(str(file)), "the message must stay one short line"


@pytest.mark.parametrize("size", [0, 7, 8, 60])
def test_a_truncated_file_is_named(path, size):
    path.write_bytes(path.read_bytes()[:size])
    said = f"it has {size} bytes" if size < 8 else rf"its header claims \d+ bytes and the file has {size}"
    with pytest.raises(WeightError, match=f"corrupt: {said}"):
        read_header(path)


def test_a_table_larger_than_any_is_not_read(path, monkeypatch):
    monkeypatch.setattr(header, "MAX_HEADER_BYTES", 16)
    with pytest.raises(WeightError, match=r"corrupt: its header claims \d+ bytes"):
        read_header(path)


def test_a_table_may_be_all_there_is_and_is_given_as_it_stands(tmp_path, monkeypatch):
    for text in (b"{}", b"", '{"größe": 1}  '.encode()):
        file = write(tmp_path / "x", text)
        monkeypatch.setattr(header, "MAX_HEADER_BYTES", len(text))
        assert header._read_table(file) == (text.decode(), 8 + len(text), 0), "as large as may be is allowed"
    file = write(tmp_path / "x", b"{}", b"12345", length=8)
    monkeypatch.undo()
    with pytest.raises(WeightError, match="its header claims 8 bytes and the file has 15"):
        header._read_table(file)


def test_data_are_not_read(tmp_path):
    file, size = tmp_path / "x", 4_000_000
    write(file, {"w": row("U8", [size], 0, size)}, bytes(size))
    tracemalloc.start()
    try:
        assert read_header(file).keys() == {"w"}
        assert tracemalloc.get_traced_memory()[1] < size // 2, "a table is small, and data may be gigabytes"
    finally:
        tracemalloc.stop()


def test_a_file_that_lost_its_last_byte_names_a_tensor(path):
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightError, match=r"truncated: tensor '[ab]\.weight'"):
        read_header(path)


def test_bytes_after_the_data_are_refused(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(WeightError, match="data bytes"):
        read_header(path)


def test_a_header_that_claims_more_than_the_file_is_not_read(tmp_path):
    file = write(tmp_path / "x", {}, length=2**63)
    with pytest.raises(WeightError, match="claims 9223372036854775808 bytes"):
        read_header(file)


def test_a_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(WeightError, match="cannot be read"):
        read_header(tmp_path)


def survives(path: Path, whole: bytes, original: dict[str, StoredTensor]) -> None:
    """The changed file is refused, or describes tensors that fill it exactly."""
    path.write_bytes(whole)
    try:
        found = read_header(path)
    except WeightError as error:
        assert "\n" not in str(error)
        return
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    assert sum(info.nbytes for info in found.values()) == len(whole) - header
    if found.keys() == original.keys():
        assert {n: i.nbytes for n, i in found.items()} == {n: i.nbytes for n, i in original.items()}


@pytest.mark.slow
def test_single_bit_flips_of_the_header(path):
    whole, original = path.read_bytes(), read_header(path)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for bit in range(0, header * 8, 3):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        survives(path, bytes(flipped), original)


@pytest.mark.slow
def test_many_bit_flips_at_once(path):
    whole, original = path.read_bytes(), read_header(path)
    rng = random.Random(0)
    for _ in range(300):
        flipped = bytearray(whole)
        for _ in range(rng.randint(2, 16)):
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        survives(path, bytes(flipped), original)


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path, noise):
    file = tmp_path / "noise.safetensors"
    file.write_bytes(noise)
    try:
        assert read_header(file) == {}
    except WeightError as error:
        assert str(file) in str(error)
