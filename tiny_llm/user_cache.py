"""Owns where things are kept that can be made again: the user's cache folder, if there is one to write to.

A container's user may have no home, and a file system may be read-only: neither is a reason to fail.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path


def user_cache() -> Path | None:
    """Our folder in $XDG_CACHE_HOME or ~/.cache, which may not be there yet; None: the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if base.startswith("~") else Path(base) / "tiny_llm"


def writable(folder: Path | None) -> Path:
    """``folder``, made if need be; where it cannot be written, one of this process, which goes with it."""
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            pass
    return Path(_own().name)


@cache
def _own() -> tempfile.TemporaryDirectory[str]:
    """For this user alone: what lies in it is loaded and run."""
    return tempfile.TemporaryDirectory(prefix="tiny_llm-")
