"""The server that foreign clients are tried on: a process of .venv, on the bundled model."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-of-the-clients"


def serving(*options: str) -> Iterator[str]:
    """Where ``main.py serve`` listens, until the generator is closed."""
    command = [str(ROOT / ".venv/bin/python"), str(ROOT / "main.py"), "serve", "--port", "0", *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        said = ""
        for line in server.stdout:
            said += line
            if found := re.search(r"http://[\d.:]+", line):
                break
        else:
            raise AssertionError(f"the server did not start:\n{said}")
        try:
            yield found.group()
        finally:
            server.terminate()
        assert "Traceback" not in server.stdout.read()


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """A server without a key."""
    yield from serving("--name", "demo")


@pytest.fixture(scope="session")
def guarded() -> Iterator[str]:
    """One that wants ``key``."""
    yield from serving("--name", "demo", "--api-key", KEY)


@pytest.fixture(scope="session")
def key() -> str:
    """The key of ``guarded``."""
    return KEY
