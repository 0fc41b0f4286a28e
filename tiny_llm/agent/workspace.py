"""Owns the folder that a run may look at and change: every path in it, no link followed, all of it bounded.

A path is walked from an open folder, one name at a time, and no name of it may be a link: what lies there is
checked by the system as it is opened, so nobody can put a link in its place between a check and the use.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

from tiny_llm.errors import ConfigError, RequestError

MAX_FILES, MAX_BYTES, MAX_FILE_BYTES = 20_000, 2**28, 2**22
"""Of a workspace: its files, all they hold, and the most that one may hold to be read or written."""
LEFT_OUT = frozenset({".git", ".hg", ".venv", "__pycache__", "node_modules", ".pytest_cache", ".mypy_cache"})
"""Folders that are not searched, measured or digested; in .git and .hg nothing can be changed either."""
_HALF = ".tiny-llm-half"  # a file that is being written; one in a folder, and no part of the workspace
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # NONBLOCK: a pipe would wait for a writer


class Workspace(AbstractContextManager["Workspace"]):
    """A folder by its open descriptor. Close it, or use it in a ``with``.

    Raises ConfigError for what is no folder; its methods raise RequestError for paths that leave it, lead
    through a link, or are no plain files, and for more than the bounds.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        try:
            self._root = os.open(self.root, _FOLDER)
        except OSError as error:
            raise ConfigError(f"The workspace {root} cannot be opened: {error.strerror}.") from error

    def __exit__(self, *_: object) -> None:
        os.close(self._root)

    def read(self, path: str) -> bytes:
        """A file's bytes."""
        with self._at(path) as (folder, name):
            return _contents(folder, name, path)

    def write(self, path: str, data: bytes, before: str) -> None:
        """A file's new bytes, whole or not at all; folders are made. Its digest must still be ``before``."""
        if len(data) > MAX_FILE_BYTES:
            raise RequestError(f"{path} would have {len(data):,} bytes; at most {MAX_FILE_BYTES:,}.")
        require_own(path)
        with self._at(path, make=True) as (folder, name):
            mode = self._require(path, folder, name, before)
            with _unlinked(folder, _HALF):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                with open(os.open(_HALF, flags, 0o600, dir_fd=folder), "wb") as file:
                    file.write(data)
                    os.fchmod(file.fileno(), mode)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(_HALF, name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)

    def remove(self, path: str, before: str) -> None:
        """Remove a file whose digest is ``before``."""
        require_own(path)
        with self._at(path) as (folder, name):
            self._require(path, folder, name, before)
            os.unlink(name, dir_fd=folder)

    def digest(self, path: str) -> str:
        """SHA-256 of a file; "" where there is none."""
        try:
            with self._at(path) as (folder, name):
                return digest_of(_contents(folder, name, path))
        except FileAbsent:
            return ""

    def files(self) -> dict[str, str]:
        """Every file's path and digest, links and what is LEFT_OUT apart. Bounded by MAX_FILES, MAX_BYTES."""
        found, size = {}, 0
        for at, folders, names, folder in os.fwalk(".", dir_fd=self._root, follow_symlinks=False):
            folders[:] = sorted(set(folders) - LEFT_OUT)
            for name in sorted(set(names) - {_HALF}):
                path = os.path.normpath(f"{at}/{name}")
                digest, length = _measured(folder, name, MAX_BYTES - size)
                size += length
                if digest:
                    found[path] = digest
                if len(found) > MAX_FILES or size > MAX_BYTES:
                    most = f"{MAX_FILES:,} files and {MAX_BYTES:,} bytes"
                    raise RequestError(f"The workspace has grown beyond {most}; name a smaller folder.")
        return found

    def _require(self, path: str, folder: int, name: str, before: str) -> int:
        """The file's mode. Raises RequestError if its digest is not ``before``."""
        try:
            now = digest_of(_contents(folder, name, path))
            mode = stat.S_IMODE(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode) & 0o777
        except FileNotFoundError:
            now, mode = "", 0o644
        if now != before:
            raise RequestError(f"{path} was changed meanwhile by somebody else. Read it again.")
        return mode

    @contextmanager
    def _at(self, path: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """The open folder that ``path`` lies in, and its last name."""
        *above, last = _names(path)
        folder = os.dup(self._root)
        try:
            for name in above:
                if make:
                    _make(folder, name)
                inner = os.open(name, _FOLDER, dir_fd=folder)
                os.close(folder)
                folder = inner
            yield folder, last
        except FileNotFoundError as error:
            raise FileAbsent(f'{path} is not there. A search for "" lists files.') from error
        except OSError as error:  # ELOOP, ENOTDIR: a link, which nobody follows
            raise RequestError(f"{path} cannot be used: {error.strerror}. Links are not followed.") from error
        finally:
            os.close(folder)


class FileAbsent(RequestError):
    """There is no such file in the workspace."""


def digest_of(data: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def tree_digest(files: dict[str, str]) -> str:
    """One digest of many files: of their paths and digests, in order."""
    return digest_of("".join(f"{digest}  {path}\n" for path, digest in sorted(files.items())).encode())


def _names(path: str) -> list[str]:
    """The names of a path from the root of a workspace. Raises RequestError for one that could leave it."""
    names = path.removeprefix("./").split("/")
    if path.startswith("/") or {"", ".", ".."} & set(names) or "\0" in path or len(path.encode()) > 1000:
        what = "must be a path from the workspace's root, such as src/main.py, without .. in it"
        raise RequestError(f"{path[:200]!r} leads out of the workspace or nowhere: it {what}.")
    return names


def require_own(path: str) -> None:
    """Raise RequestError for what is not to be changed: git runs what lies in its folder."""
    if not LEFT_OUT.isdisjoint(path.casefold().split("/")):
        raise RequestError(f"{path} must not be changed, as all in {', '.join(sorted(LEFT_OUT))}.")


def _make(folder: int, name: str) -> None:
    with suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=folder)


@contextmanager
def _opened(folder: int, name: str) -> Iterator[IO[bytes] | None]:
    """A plain file; None for what is none."""
    descriptor = os.open(name, _FILE, dir_fd=folder)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            with open(descriptor, "rb", closefd=False) as file:
                yield file
        else:
            yield None
    finally:
        os.close(descriptor)


def _contents(folder: int, name: str, path: str) -> bytes:
    with _opened(folder, name) as file:
        if file is None:
            raise RequestError(f'{path} is no plain file. A search for "" lists files.')
        data = file.read(MAX_FILE_BYTES + 1)  # whatever its size is said to be: it may be growing
    if len(data) > MAX_FILE_BYTES:
        raise RequestError(f"{path} is too large: a file may have {MAX_FILE_BYTES:,} bytes.")
    return data


def _measured(folder: int, name: str, most: int) -> tuple[str, int]:
    """A plain file's digest and length, of at most a little more than ``most`` bytes; ("", 0): it is none."""
    digest, length = hashlib.sha256(), 0
    try:
        with _opened(folder, name) as file:
            if file is None:
                return "", 0
            while length <= most and (piece := file.read(2**20)):
                digest.update(piece)
                length += len(piece)
    except OSError:  # a link, or gone
        return "", 0
    return digest.hexdigest(), length


@contextmanager
def _unlinked(folder: int, name: str) -> Iterator[None]:
    """``name`` is not there before, and not afterwards."""

    def unlink() -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)

    unlink()
    try:
        yield
    finally:
        unlink()
