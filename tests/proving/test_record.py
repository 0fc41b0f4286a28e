"""What was found on a machine: kept for it alone, read with suspicion."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from tiny_llm.config import Quantization
from tiny_llm.proving import record
from tiny_llm.proving.record import KernelTiming, Proof, Record, Shapes, records

FOUND = Proof("rope", "", (KernelTiming("1 row", 2.0, 3.0), KernelTiming("16 rows", 4.0, 2.0)))


def test_what_was_kept_is_read_by_the_next_process(shapes: Shapes) -> None:
    Record.of("metal", shapes).add([FOUND])
    Record.of("metal", shapes).add([Proof("swiglu", "off by 2")])
    kept = Record.of("metal", shapes)
    assert kept.read() == {"rope": FOUND, "swiglu": Proof("swiglu", "off by 2")}
    assert (kept.backend, kept.shapes) == ("metal", shapes)
    assert [one.path for one in records()] == [kept.path]
    assert FOUND.slowest == KernelTiming("16 rows", 4.0, 2.0) and FOUND.slowest.ratio == 0.5


@pytest.mark.parametrize("what", ["mlx", "system", "kernels", "device", "shapes", "backend"])
def test_another_machine_or_text_is_another_record(
    what: str, shapes: Shapes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Record.of("metal", shapes).add([FOUND])
    backend = "metal"
    if what == "mlx":
        monkeypatch.setattr(record, "version", lambda _: "0.99")
    elif what == "system":
        monkeypatch.setattr(record.platform, "version", lambda: "build 25A1")
    elif what == "device":
        monkeypatch.setattr(record.mx, "device_info", lambda: {"device_name": "Apple M9"})
    elif what == "kernels":
        (tmp_path / "metal").mkdir()
        (tmp_path / "metal" / "new.metal").write_text("// other text")
        monkeypatch.setenv("TINY_LLM_KERNELS", str(tmp_path))
    elif what == "shapes":
        shapes = replace(shapes, dtype="float16")
    else:
        backend = "cuda"
    assert Record.of(backend, shapes).read() == {}
    listed = {one.key[what] == Record.of(backend, shapes).key[what] for one in records()}
    assert listed == ({False} if what in ("shapes", "backend") else set()), "doctor tells of this machine"


def _edit(change: Callable[[dict[str, object]], object]) -> Callable[[str], str]:
    def edited(text: str) -> str:
        stored = json.loads(text)
        changed = change(stored)
        return json.dumps(stored if changed is None else changed)

    return edited


@pytest.mark.parametrize(
    "edit",
    [
        lambda _: "",
        lambda text: text[:-5],
        lambda _: "[]",
        lambda _: "null",
        _edit(lambda stored: stored["key"].update(mlx="1")),
        _edit(lambda stored: stored.pop("proofs")),
        _edit(lambda stored: stored.update(proofs=[3])),
        _edit(lambda stored: stored["proofs"][0].update(wrong=None)),
        _edit(lambda stored: stored["proofs"][0].update(timings="fast")),
        _edit(lambda stored: stored["proofs"][0]["timings"][0].update(ours_us="1")),
        _edit(lambda stored: stored["proofs"][0]["timings"][0].update(ours_us=0.0)),
        _edit(lambda stored: stored["proofs"][0]["timings"][0].update(mlx_us=float("nan"))),
        _edit(lambda stored: stored["proofs"][0]["timings"][0].update(more=1)),
    ],
)
def test_a_file_that_was_edited_is_as_none(edit: Callable[[str], str], shapes: Shapes) -> None:
    kept = Record.of("metal", shapes)
    kept.add([FOUND])
    kept.path.write_text(edit(kept.path.read_text()))
    assert kept.read() == {}
    kept.add([FOUND])
    assert kept.read() == {"rope": FOUND}, "and is written anew"


def test_bytes_that_are_no_text_are_as_none(shapes: Shapes) -> None:
    kept = Record.of("metal", shapes)
    kept.path.write_bytes(b"\xff\xfe\x00")
    assert kept.read() == {} and records() == []


def test_a_folder_that_cannot_be_made_is_replaced_by_one_of_the_process(
    shapes: Shapes, own_cache: Path
) -> None:
    own_cache.write_text("a file where the folder should be")
    Record.of("metal", shapes).add([FOUND])
    assert Record.of("metal", shapes).read() == {"rope": FOUND}
    assert records() == []


def test_many_write_at_once_and_a_reader_sees_whole_files(shapes: Shapes) -> None:
    kept = Record.of("metal", shapes)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: kept.add([Proof("rope", str(i))]), range(40)))
        read = list(pool.map(lambda _: kept.read(), range(8)))
    assert all(set(one) == {"rope"} for one in read)
    assert list(kept.path.parent.iterdir()) == [kept.path], "no temporary file stays"


def test_shapes_are_those_that_the_model_is_loaded_with() -> None:
    config = SimpleNamespace(
        **{"hidden_size": 896, "num_heads": 14, "num_kv_heads": 2, "head_dim": 64, "vocab_size": 99},
        **{"intermediate_size": 4864, "quantization": None},
    )
    made = Shapes.of(config, 4, mx.bfloat16, 16)
    assert made == Shapes(896, 14, 2, 64, 4864, 99, 4, 64, "bfloat16", 16)
    unpacked = Shapes.of(config, None, mx.float16, 32)
    assert unpacked == replace(made, bits=0, dtype="float16", block_size=32, dense=True)
    config.quantization = Quantization(8, 128)
    stored = Shapes.of(config, None, mx.bfloat16, 16)
    assert (stored.bits, stored.group_size, stored.dense) == (8, 128, False)
    config.quantization = Quantization(6, 64)
    assert Shapes.of(config, None, mx.bfloat16, 16).bits == 0, "our kernels have no 6 bits"
    config.quantization = Quantization(4, 64, {"a": Quantization(8, 64), "b": Quantization(8, 32)})
    mixed = Shapes.of(config, None, mx.bfloat16, 16)
    assert mixed.formats == [(4, 64), (8, 32), (8, 64)] and not mixed.dense
    for other in (None, Quantization(6, 64)):
        config.quantization = Quantization(4, 64, {"lm_head": other})
        assert Shapes.of(config, None, mx.bfloat16, 16) == replace(made, dense=True)


def test_a_record_of_a_model_of_several_formats_is_read(shapes: Shapes) -> None:
    mixed = replace(shapes, more="8/32 8/64", dense=True)
    Record.of("metal", mixed).add([FOUND])
    assert Record.of("metal", mixed).read() == {"rope": FOUND}
    assert [one.shapes for one in records()] == [mixed]
