"""A GGUF file's header: whatever a file has become, it loads as it was or is refused in one line."""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.errors import TinyLLMError, WeightError
from tiny_llm.models.checkpoint import GgufCheckpoint
from tiny_llm.weights.gguf.header import MAX_ITEMS, read_gguf
from tiny_llm.weights.header import StoredTensor

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")
from write_gguf import write_gguf  # noqa: E402

F32, Q8_0 = 0, 8
Row = tuple[str, Sequence[int], int, int]


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def write(path: Path, rows: Sequence[Row] = (), data: bytes = b"", keys: Sequence[bytes] = ()) -> Path:
    """A file of these tensors (name, dims as they are written, type, offset) and metadata."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(rows), len(keys)) + b"".join(keys)
    for name, dims, kind, offset in rows:
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + data)
    return path


def refused(path: Path) -> str:
    with pytest.raises(WeightError) as error:
        read_gguf(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_what_the_gguf_package_writes(tmp_path: Path) -> None:
    """Every kind of value and every type of tensor that its writer makes."""
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int64("a.i64", -(2**40))
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.yes", True)
    writer.add_array("a.words", ["", "é", "x" * 300])
    writer.add_array("a.numbers", [-1, 2, 3])
    floats = np.arange(128, dtype=np.float32).reshape(2, 64)
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(kind, gguf.quants.quantize(floats, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf(tmp_path / "x.gguf")
    assert header.metadata == {
        "general.architecture": "llama",
        "a.u8": 200,
        "a.i64": -(2**40),
        "a.f64": 0.1,
        "a.yes": True,
        "a.words": ["", "é", "x" * 300],
        "a.numbers": [-1, 2, 3],
    }
    for theirs in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        place = int(theirs.n_bytes), int(theirs.data_offset)
        stored = StoredTensor(tmp_path / "x.gguf", theirs.name, (2, 64), *place)
        assert header.tensors[theirs.name] == stored


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"", "goes beyond its 0 bytes"),
        (b"GGML" + bytes(60), "is no GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(40), "of GGUF version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(40), "has '' twice|0 dimensions"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + bytes(4), "goes beyond"),
    ],
    ids=["empty", "magic", "big-endian", "tensors", "keys"],
)
def test_a_head_that_is_none(tmp_path: Path, head: bytes, what: str) -> None:
    (tmp_path / "x.gguf").write_bytes(head)
    message = refused(tmp_path / "x.gguf")
    assert any(part in message for part in what.split("|")), message


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (text(b"\xff"), "not UTF-8"),
        (struct.pack("<Q", 1000), "goes beyond"),
        (struct.pack("<Q", 2**62), f"a text of {2**62} bytes"),
        (pair("a", 13, b""), "a value of type 13"),
        (pair("a", 9, struct.pack("<IQ", 9, 1)), "an array of type 9"),
        (pair("a", 9, struct.pack("<IQ", 0, MAX_ITEMS + 1)), f"an array of {MAX_ITEMS + 1} items"),
        (pair("a", 9, struct.pack("<IQ", 4, MAX_ITEMS)), "goes beyond"),
        (pair("general.alignment", 4, struct.pack("<I", 12)), "its alignment is 12"),
        (pair("general.alignment", 8, text("32")), "its alignment is '32'"),
    ],
    ids=["utf-8", "length", "endless", "type", "nested", "items", "numbers", "alignment", "alignment-text"],
)
def test_metadata_that_cannot_be(tmp_path: Path, key: bytes, what: str) -> None:
    assert what in refused(write(tmp_path / "x.gguf", keys=[key]))


@pytest.mark.parametrize(
    ("rows", "size", "what"),
    [
        ([("a", [8], F32, 0)], 31, "end at"),
        ([("a", [8], F32, 0)], 64, "end at"),
        ([("a", [8], F32, 32)], 64, "starts at 32, expected 0"),
        ([("a", [8], F32, 0), ("b", [8], F32, 0)], 64, "starts at 0, expected 32"),
        ([("a", [8], F32, 0), ("a", [8], F32, 32)], 64, "has 'a' twice"),
        ([("a", [], F32, 0)], 32, "has 0 dimensions"),
        ([("a", [1] * 5, F32, 0)], 32, "has 5 dimensions"),
        ([("a", [0, 8], F32, 0)], 32, "impossible shape [8, 0]"),
        ([("a", [33, 2], Q8_0, 0)], 96, "impossible shape [2, 33]"),
        ([("a", [2**40, 2**40], F32, 0)], 32, "end at"),
        ([("a", [32], 20, 0)], 32, "'a' is IQ4_NL, which is not read"),
        ([("a", [32], 999, 0)], 32, "'a' is of type 999, which is not read"),
    ],
)
def test_tensors_that_cannot_be(tmp_path: Path, rows: Sequence[Row], size: int, what: str) -> None:
    assert what in refused(write(tmp_path / "x.gguf", rows, bytes(size)))


def test_the_last_tensor_may_go_without_its_padding(tmp_path: Path) -> None:
    for size in (4, 20, 32):
        header = read_gguf(write(tmp_path / "x.gguf", [("a", [1], F32, 0)], bytes(size)))
        assert header.tensors["a"].nbytes == 4


def test_a_large_file_is_not_read_to_find_that_it_is_broken(tmp_path: Path) -> None:
    """4 GB, nearly all of them a hole, and a text that claims half of it."""
    path = write(tmp_path / "x.gguf", keys=[struct.pack("<Q", 2**31)])
    os.truncate(path, 2**32)
    tracemalloc.start()
    refused(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6, f"{peak / 1e6:.0f} MB"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refused(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Path:
    """A small model with all that a file has: facts, tokens, packed and float matrices."""
    source = tmp_path_factory.mktemp("source")
    for file in (golden / "qwen2_tied").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tokens = {chr(ord("A") + i): i for i in range(60)} | {"no": 60}
    model = {"byte_fallback": False, "vocab": tokens, "merges": ["n o"]}
    added = [{"id": 61, "content": "<|im_end|>", "special": True}]
    (source / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return write_gguf(source, source / "whole.gguf", "Q8_0")


def weights_of(path: Path) -> dict[str, bytes]:
    """All of a file, loaded; its tensors as bytes."""
    checkpoint = GgufCheckpoint(path)
    assert checkpoint.tokenizer is not None and checkpoint.end_ids is not None
    loaded = checkpoint.tensors(dtype=None, quantize=None, finish=lambda weight: weight)
    return {name: repr(array).encode() + contents(array) for name, array in loaded.items()}


def contents(matrix: object) -> bytes:
    arrays = [matrix] if isinstance(matrix, mx.array) else [matrix.packed, matrix.scales, matrix.biases]
    return b"".join(bytes(memoryview(mx.contiguous(array).view(mx.uint8))) for array in arrays)


@pytest.mark.slow
def test_2000_flips_and_cuts_load_as_they_were_or_are_refused(whole: Path, tmp_path: Path) -> None:
    """A flip is of the header: the tensors' own bytes have no checksum."""
    before, data = weights_of(whole), whole.read_bytes()
    start = min(info.start for info in read_gguf(whole).tensors.values())
    draw, path = random.Random(5), tmp_path / "x.gguf"
    refusals = 0
    for number in range(2000):
        broken = bytearray(data)
        if number % 4:
            for _ in range(draw.choice((1, 1, 1, 2, 8))):
                broken[draw.randrange(start)] ^= 1 << draw.randrange(8)
        else:
            del broken[draw.randrange(len(data)) :]
        path.write_bytes(broken)
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        tracemalloc.start()
        try:
            after = weights_of(path)
            assert after == before, f"number {number} loads as something else"
        except TinyLLMError as error:
            refusals += 1
            assert "\n" not in str(error).strip() or "problems:" in str(error), f"number {number}: {error}"
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 4e6, f"number {number} took {peak / 1e6:.1f} MB for a file of {len(data) / 1e6:.1f}"
        assert mx.get_peak_memory() - held < 4e6, f"number {number} took much of MLX's memory"
    assert 1000 < refusals < 1950, refusals
