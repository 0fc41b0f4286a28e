"""Blocks on disk: whole or not there, whoever damages them and whenever the process dies."""

from __future__ import annotations

import errno
import logging
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getsource
from pathlib import Path

import pytest

from tiny_llm.errors import ConfigError
from tiny_llm.kv import disk
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.kv.disk import BlockStore
from tiny_llm.kv.prefix import chain, content, encode, root

MODEL = bytes(range(32))
ROOT = Path(__file__).parents[2]


def held(number: int, salt: str = "") -> bytes:
    """What a full block holds, one for each number."""
    tokens = encode([number] * 16)
    return content(root(salt), tokens, chain(root(salt), tokens))


def data(number: int) -> bytes:
    return random.Random(number).randbytes(1000)


@contextmanager
def store(folder: Path, most: int = 10**6, model: bytes = MODEL) -> Iterator[BlockStore]:
    made = BlockStore(folder, most, model)
    try:
        yield made
    finally:
        made.close()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"))


def test_what_was_written_is_found_after_a_restart(tmp_path: Path) -> None:
    with store(tmp_path / "new" / "folder") as first:
        for number in range(3):
            first.write(held(number), data(number))
            assert held(number) in first, "it will soon be there"
    with store(tmp_path / "new" / "folder") as second:
        assert held(1) in second and held(7) not in second
        assert [second.read(held(number)) for number in (0, 1, 2, 7)] == [data(0), data(1), data(2), None]
        assert second.read(held(1, "of another key")) is None
        assert (second.usage.blocks, second.usage.read, second.usage.damaged) == (3, 3, 0)
        assert second.usage.bytes == sum(path.stat().st_size for path in files(tmp_path / "new/folder"))


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    with store(tmp_path) as first:
        first.write(held(0), data(0))
    with store(tmp_path, model=bytes(32)) as other:
        assert held(0) not in other and other.usage.blocks == 1, "it counts for the size"
        (theirs,) = files(tmp_path)
        stolen = tmp_path / bytes(16).hex() / theirs.name
        stolen.write_bytes(theirs.read_bytes())
    with store(tmp_path, model=bytes(32)) as other:
        assert other.read(held(0)) is None and other.usage.damaged == 1, "a file says whose it is"


def test_any_damage_is_a_miss(tmp_path: Path) -> None:
    with store(tmp_path) as first:
        first.write(held(0), data(0))
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    chance = random.Random(3)
    for _ in range(60):
        at, change = chance.randrange(len(whole)), chance.choice(("flip", "cut", "longer", "gone", "folder"))
        broken = bytearray(whole)
        if change == "flip":
            broken[at] ^= 1 << chance.randrange(8)
        path.write_bytes(broken[:at] if change == "cut" else broken + b"x" * (change == "longer"))
        with store(tmp_path) as again:
            if change in ("gone", "folder"):
                path.unlink()
            if change == "folder":
                path.mkdir()
            assert again.read(held(0)) is None, change
            assert again.usage.damaged == 1 and held(0) not in again
            if change == "folder":
                path.rmdir()
            again.write(held(0), data(0))  # and it can be had anew
    with store(tmp_path) as last:
        assert last.read(held(0)) == data(0)


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    with store(tmp_path) as first:
        first.write(held(0), data(0))
    size = files(tmp_path)[0].stat().st_size
    with store(tmp_path, 3 * size) as small:
        for number in (1, 2):
            small.write(held(number), data(number))
        while small.usage.blocks < 3:
            time.sleep(0.001)
        assert small.read(held(0)) == data(0), "now 1 is the oldest"
        small.write(held(3), data(3))
    with store(tmp_path, 2 * size) as smaller:
        found = [number for number in range(4) if held(number) in smaller]
        assert found == [0, 2, 3] and smaller.usage.bytes == 3 * size
        smaller.write(held(4), data(4))
    with store(tmp_path) as last:
        assert [number for number in range(5) if held(number) in last] == [3, 4]


def test_the_folder_is_its_owners_alone_and_others_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    with store(folder) as first:
        first.write(held(0), data(0))
    (path,) = files(folder)
    assert [found.stat().st_mode & 0o777 for found in (path.parent, path)] == [0o700, 0o600]
    half = path.with_suffix(".part")
    others = [folder / "thesis.part", path.parent / "notes.part", path.parent / "film.kv"]
    for left in (half, *others):
        left.write_text("x")
    with store(folder) as second:
        assert second.usage.blocks == 1 and not half.exists()
    assert all(other.read_text() == "x" for other in others)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with store(tmp_path), pytest.raises(ConfigError, match="in use by another process; give each its own"):
        BlockStore(tmp_path, 10**6, MODEL)
    with store(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--kv-disk\) .*file cannot be used: Not a directory"):
        BlockStore(tmp_path / "file", 10**6, MODEL)


def test_a_full_disk_is_told_once_and_what_is_there_is_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with store(tmp_path) as first, caplog.at_level(logging.WARNING):
        first.write(held(0), data(0))
        while not first.usage.written:
            time.sleep(0.001)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", full)
            first.write(held(1), data(1))
            while first.usage.fault is None:
                time.sleep(0.001)
        first.write(held(2), data(2))
        assert first.read(held(0)) == data(0) and held(2) not in first
        assert first.usage.fault == "No space left on device"
    assert [record.message for record in caplog.records if "No space left" in record.message] == [
        caplog.records[0].message
    ]
    assert len(files(tmp_path)) == 1, "nothing half written is left"


def test_what_is_too_much_to_write_is_dropped_or_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "QUEUE_BYTES", 2500)
    with store(tmp_path) as slow:
        real = slow._write_file

        def slowly(*given: object) -> None:
            time.sleep(0.02)
            real(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(slow, "_write_file", slowly)
        for number in range(10):
            slow.write(held(number), data(number))
        assert slow.usage.dropped == 8
        for number in range(10, 15):
            slow.write(held(number), data(number), wait=True)
        assert slow.usage.dropped == 8
    assert len(files(tmp_path)) == 7


WRITES = f"""
import random, sys
from pathlib import Path
from tiny_llm.kv.disk import BlockStore
from tiny_llm.kv.prefix import chain, content, encode, root
{getsource(held)}
{getsource(data)}
store = BlockStore(Path(sys.argv[1]), 60_000, bytes(range(32)))
for number in range(10**6):
    assert store.read(held(number % 50)) in (None, data(number % 50))
    store.write(held(number % 50), data(number % 50), wait=True)
    if not number:
        print("begun", flush=True)
"""


@pytest.mark.slow
def test_killed_while_it_writes_it_leaves_no_wrong_file(tmp_path: Path) -> None:
    chance, found = random.Random(5), 0
    for _ in range(50):
        writes = [sys.executable, "-c", WRITES, str(tmp_path)]
        with subprocess.Popen(writes, stdout=subprocess.PIPE, cwd=ROOT) as child:
            assert child.stdout is not None and child.stdout.readline() == b"begun\n"
            time.sleep(chance.uniform(0, 0.03))
            child.kill()
        with store(tmp_path) as after:
            for number in range(50):
                there = held(number) in after
                assert after.read(held(number)) == (data(number) if there else None)
                found += there
            assert not after.usage.damaged and after.usage.bytes <= 60_000
    assert found > 500, "hardly anything was written"


def test_a_fork_that_is_swapped_out_before_its_blocks_have_names_is_loaded_all_the_same() -> None:
    """Its names were copied before those of the step that it came of: the engine broke."""

    class Store:
        def worth_reading(self, computed_ms: float, within_ms: float) -> int:
            return 8

        def read(self, content: bytes) -> None:
            return None

        def __contains__(self, content: bytes) -> bool:
            return False

    blocks = BlockManager(16, 12, slab=2, host_blocks=12, store=Store())  # type: ignore[arg-type]
    table, tokens = blocks.table(), [1] * 40
    blocks.allocate(table, tokens)
    child = blocks.fork(table, 40)
    assert blocks.swap_out(child, 40)
    blocks.free(table)
    blocks.drain()
    blocks.shrink()
    assert blocks.capacity == 2, "of an empty pool nothing is kept on the host either"
    assert blocks.allocate(child, [*tokens, 2] * 2) == 40
    assert blocks.load(child, [*tokens, 2] * 2, 40, 1.0, 100.0) == 40
