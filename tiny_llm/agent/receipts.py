"""Owns a run's log: a line of JSON for each thing that was proposed and done, appended and never changed.

Each line holds the digest of the one before it, and one of itself. An edited, missing or added line is
noticed, and by the digest of the last, which lies beside it, so is an end that was cut off. Whoever can write
both files can write another history: note the last digest elsewhere to notice that, too.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tiny_llm.agent.workspace import digest_of
from tiny_llm.errors import ConfigError

Record = Mapping[str, Any]
LOG, HEAD = "log.jsonl", "head"


class Log(AbstractContextManager["Log"]):
    """The log in ``folder``, which is made if need be; one process at a time has it.

    ``records`` are all lines. A last line that was cut short, as by a kill, was never appended.

    Raises ConfigError for a log that was changed, or is in use.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = open(folder / LOG, "a+b")  # noqa: SIM115 - closed by ``close``
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.records, length = _read(folder)
        except BlockingIOError as error:
            self._file.close()
            raise ConfigError(f"The run in {folder} goes on in another process; wait for its end.") from error
        except ConfigError:
            self._file.close()
            raise
        self._file.truncate(length)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def head(self) -> str:
        """The digest of the last record, and by it of all; "" of an empty log."""
        return self.records[-1]["digest"] if self.records else ""

    def append(self, kind: str, **said: Any) -> Record:
        """Add a record; it is on the disk when this returns."""
        record = {"n": len(self.records), "kind": kind, **said, "before_it": self.head}
        record["digest"] = _digest(record)
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        _write_head(self.folder, record["digest"])
        self.records.append(record)
        return record


def read_log(folder: Path) -> list[Record]:
    """The records of a log that nobody changed. Raises ConfigError for one that somebody did."""
    return _read(folder)[0]


def _read(folder: Path) -> tuple[list[Record], int]:
    """The records, and how many bytes of the file they are."""
    path = folder / LOG
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    records = list(_checked(path, lines))
    head = (folder / HEAD).read_text().strip() if (folder / HEAD).is_file() else ""
    # A kill may come between a line and its head: then the one before is there.
    if head not in [record["digest"] for record in records[-2:]] + [""] * (len(records) < 2):
        raise ConfigError(f"{path} was cut off or replaced: its last line is not the one that was written.")
    return records, sum(len(line) + 1 for line in lines)


def _checked(path: Path, lines: list[bytes]) -> Iterator[Record]:
    before = ""
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            is_own = record["digest"] == _digest({k: v for k, v in record.items() if k != "digest"})
            is_next = (record["n"], record["before_it"]) == (number, before)
        except (ValueError, TypeError, KeyError, AttributeError):
            is_own = is_next = False
        if not (is_own and is_next):
            what = "was changed, added or removed after it was written"
            raise ConfigError(
                f"{path}, line {number + 1}: it or the one before {what}; this log proves nothing."
            )
        before = record["digest"]
        yield record


def _digest(record: Record) -> str:
    return digest_of(json.dumps(record, sort_keys=True).encode())


def _write_head(folder: Path, digest: str) -> None:
    half = folder / f"{HEAD}.half"
    half.write_text(digest)
    os.replace(half, folder / HEAD)
