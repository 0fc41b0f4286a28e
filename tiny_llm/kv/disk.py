"""Owns the prefix cache's blocks on disk: those that left the pool, found again after a restart.

A file holds one block, under its chained name, in a folder of the model's fingerprint. It is whole or not
there (written under another name, then renamed), and ends with a digest of all of it. What is damaged or
of another model is a miss. Writing has a thread of its own, and nobody waits for it. What the bytes mean
is the caches' to know.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from tiny_llm.errors import ConfigError
from tiny_llm.kv.prefix import DIGEST
from tiny_llm.limits import check_whole

QUEUE_BYTES = 2**28  # as much may wait to be written; what comes when it is full is dropped, and counted
_LAYOUT = b"tiny_llm KV 1\n"  # of a file, and of the keys and values in it
_FIRST_READ_MS = 1.0  # a block, before one was read
_MOST_READ = 512  # blocks at once: they are in memory twice
_HEX = "[0-9a-f]"
_LOG = logging.getLogger("tiny_llm.kv")


class DiskUsage(NamedTuple):
    """What lies on disk, of all models; since the start: blocks written, read, dropped and damaged.

    ``fault`` says why nothing is written any more.
    """

    blocks: int
    bytes: int
    written: int
    read: int
    dropped: int
    damaged: int
    fault: str | None


class BlockStore:
    """Blocks of the model with this ``fingerprint``, in ``folder`` beside those of others.

    All of them take at most ``most_bytes``: the least recently used go first. Close it, to have all written.

    Raises ConfigError where the folder cannot be used, or another process uses it.
    """

    def __init__(self, folder: Path, most_bytes: int, fingerprint: bytes) -> None:
        check_whole("kv_disk_size (--kv-disk-size)", most_bytes, most=2**63)
        self._fingerprint = fingerprint
        self._most_bytes = most_bytes
        self._folder = folder / fingerprint.hex()[:32]
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._held = _hold(folder)
            self._files = _files_in(folder)  # bytes of each, least recently used first
        except OSError as error:
            raise ConfigError(f"kv_disk (--kv-disk) {folder} cannot be used: {error.strerror}.") from None
        self._bytes = sum(self._files.values())
        self._counts = dict.fromkeys(("written", "read", "dropped", "damaged"), 0)
        self._fault: str | None = None
        self._read_ms = 0.0
        self._lock = threading.Lock()  # of all that two threads change
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()  # contents
        self._waiting: dict[Path, bytes] = {}  # what is to be written
        self._waiting_bytes = 0
        self._writer = threading.Thread(target=self._write_all, name="kv-disk", daemon=True)
        self._writer.start()

    def __contains__(self, content: bytes) -> bool:
        """Whether ``content`` (see ``prefix.content``) has a file, or soon will."""
        path = self._path(content)
        return path in self._files or path in self._waiting

    @property
    def usage(self) -> DiskUsage:
        """The accounts."""
        with self._lock:
            return DiskUsage(len(self._files), self._bytes, fault=self._fault, **self._counts)

    def worth_reading(self, computed_ms: float, within_ms: float) -> int:
        """How many blocks to read at once, at most: within a time, and none that is sooner computed."""
        self._read_ms *= 0.99  # believed a little less each time, so that it is tried again
        each = self._read_ms or _FIRST_READ_MS
        return int(min(_MOST_READ, max(1.0, within_ms / each))) if self._read_ms < computed_ms else 0

    def read(self, content: bytes) -> bytes | None:
        """The keys and values of ``content``; None where they are not, or not whole."""
        path = self._path(content)
        if (waiting := self._waiting.get(path)) is not None:
            return waiting
        if path not in self._files:
            return None
        began = time.perf_counter()
        try:
            data = self._checked(path.read_bytes(), content)
            os.utime(path)
        except (OSError, ValueError):
            with self._lock:
                self._counts["damaged"] += 1
                self._remove(path)
            return None
        with self._lock:
            self._counts["read"] += 1
            if path in self._files:
                self._files.move_to_end(path)
        self._read_ms += (1e3 * (time.perf_counter() - began) - self._read_ms) / 8
        return data

    def write(self, content: bytes, data: bytes, *, wait: bool = False) -> None:
        """Keep ``data`` under ``content``, soon. If too much waits already it is dropped, or waits too."""
        while wait and self._waiting_bytes > QUEUE_BYTES // 2 and self._writer.is_alive():
            time.sleep(0.001)
        with self._lock:
            if self._fault or content in self:
                return
            if self._waiting_bytes + len(data) > QUEUE_BYTES:
                self._counts["dropped"] += 1
                return
            self._waiting[self._path(content)] = data
            self._waiting_bytes += len(data)
        self._queue.put(content)

    def close(self) -> None:
        """Write what waits, and let others have the folder. May be repeated."""
        self._queue.put(None)
        self._writer.join()
        with suppress(OSError):  # it is closed already
            os.close(self._held)
        self._held = -1

    def _path(self, content: bytes) -> Path:
        return self._folder / f"{content[:DIGEST].hex()}.kv"

    def _head(self, content: bytes) -> bytes:
        return _LAYOUT + self._fingerprint + len(content).to_bytes(4, "little") + content

    def _checked(self, file: bytes, content: bytes) -> bytes:
        """The keys and values in a ``file`` that is to hold ``content``. Raises ValueError for another."""
        head = self._head(content)
        if not file.startswith(head) or hashlib.sha256(file[:-DIGEST]).digest() != file[-DIGEST:]:
            raise ValueError("it holds something else, or not all of it")
        return file[len(head) : -DIGEST]

    def _write_all(self) -> None:
        """The thread's work. The first fault of the disk ends it."""
        while (content := self._queue.get()) is not None:
            path = self._path(content)
            try:
                if not self._fault:
                    self._write_file(path, self._head(content) + self._waiting[path])
            except OSError as error:
                self._fault = f"{error.strerror}"
                _LOG.warning("no more keys and values are written to %s: %s", self._folder, error.strerror)
            with self._lock:
                self._waiting_bytes -= len(self._waiting.pop(path))

    def _write_file(self, path: Path, file: bytes) -> None:
        size = len(file) + DIGEST
        with self._lock:
            while self._files and self._bytes + size > self._most_bytes:
                self._remove(next(iter(self._files)))
        if size > self._most_bytes:
            return
        part = path.with_suffix(".part")
        try:
            with open(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as out:
                out.write(file)
                out.write(hashlib.sha256(file).digest())
            part.rename(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        with self._lock:
            self._files[path] = size
            self._bytes += size
            self._counts["written"] += 1

    def _remove(self, path: Path) -> None:
        self._bytes -= self._files.pop(path, 0)
        with suppress(OSError):
            path.unlink()


def _hold(folder: Path) -> int:
    """A descriptor of the folder's lock. Raises ConfigError where another process has it."""
    held = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise ConfigError(
            f"kv_disk (--kv-disk) {folder} is in use by another process; give each its own folder."
        ) from None
    return held


def _files_in(folder: Path) -> OrderedDict[Path, int]:
    """The blocks' files of all models, the least recently used first; what was left half written goes."""
    found = []
    for path in folder.glob(f"{_HEX * 32}/{_HEX * 2 * DIGEST}.*"):  # nobody else's files have such names
        if path.suffix == ".part":
            path.unlink()
        elif path.suffix == ".kv":
            status = path.stat()
            found.append((status.st_mtime, path, status.st_size))
    return OrderedDict((path, size) for _, path, size in sorted(found))
