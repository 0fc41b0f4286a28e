"""Owns ``--course FOLDER``: the same command once more, with a learner's code in place."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from book.course.native import prepare
from book.course.overlay import BACKEND_VARIABLE, VARIABLE
from book.course.workbook import Workbook
from tiny_llm.errors import ConfigError


def restart_with_learner(arguments: Sequence[str]) -> None:
    """Replace this process by one that has no ``--course`` but the variable: it acts before modules load.

    ``arguments`` are the process's own. Raises ConfigError if the folder is none, or cannot
    be read or compiled.
    """
    at = arguments.index("--course")
    folder = Path(arguments[at + 1]) if at + 1 < len(arguments) else None
    if folder is None or not folder.is_dir():
        raise ConfigError(f"--course needs a learner's folder, got {folder}; `course start 1.1` makes one.")
    for file in Workbook(folder).kernels():
        prepare(file, folder)
    if not Workbook(folder).written():
        print(f"warning: nothing in {folder} is written yet; all of it is the reference's.", file=sys.stderr)
    os.environ[VARIABLE] = str(folder.resolve())
    rest = [*arguments[:at], *arguments[at + 2 :]]
    if rest[:1] == ["memory"]:  # it runs no kernel in a learner's place, and its dtypes are the backend's
        os.environ.setdefault(BACKEND_VARIABLE, "")
    before = sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)]
    os.execv(sys.executable, [sys.executable, *before, *rest])
