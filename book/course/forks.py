"""Owns a process that has pytest and MLX loaded, and forks: each run of tests is a process of its own.

Knows no chapter. What a learner may change is loaded after the fork: this imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_LOADED = (
    *("mlx.core", "mlx.nn", "numpy.random", "hypothesis.strategies", "pytest", "tokenizers", "typer.testing"),
    *("fastapi", "huggingface_hub", "jinja2.sandbox", "llguidance", "msgspec", "pdb", "rich.console"),
)
"""What the tests of chapters import of others. Nothing that starts a thread: a fork would not have it."""


class Forks:
    """A process that runs pytest in forks of itself, one at a time. Close it, or use it in a ``with``."""

    def __init__(self) -> None:
        """Start it: half a second, once."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "book.course.forks"],
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str], seconds: float
    ) -> subprocess.CompletedProcess[str]:
        """As ``python -m pytest`` with these ``arguments`` in this ``environment``.

        Raises subprocess.TimeoutExpired if it does not end.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            asked = {"arguments": arguments, "environment": environment, "seconds": seconds, "folder": folder}
            print(json.dumps(asked), file=self._process.stdin, flush=True)
            code = int(self._process.stdout.readline())
            out, err = ((Path(folder) / name).read_text(errors="replace") for name in ("out", "err"))
        if code == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(list(arguments), seconds, out.encode(), err.encode())
        return subprocess.CompletedProcess(list(arguments), code, out, err)


def _child(
    arguments: Sequence[str], environment: Mapping[str, str], seconds: float, folder: str
) -> None:  # never returns
    code = 3  # pytest's own error
    try:
        for number, name in enumerate(("out", "err"), 1):
            os.dup2(os.open(Path(folder) / name, os.O_CREAT | os.O_WRONLY), number)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        os.environ.clear()
        os.environ.update(environment)
        code = int(importlib.import_module("pytest").main(list(arguments)))
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    plugins = importlib.import_module("_pytest.config").default_plugins
    for name in (*_LOADED, *(f"_pytest.{plugin}" for plugin in plugins)):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # a fork that collects would copy all of it
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _child(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
