"""Owns running a chapter's tests on a learner's code, and finding the definition to blame.

The tests are the project's own, run by pytest in a process whose imports the overlay changes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from book.course.forks import Forks
from book.course.manifest import ROOT, Chapter
from book.course.overlay import QUICK_VARIABLE, VARIABLE, WITHOUT_VARIABLE
from tiny_llm.errors import ConfigError

_QUIET = ("-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-p", "book.course.report")
_BARE = ("-x", "--assert=plain", *(f"-pno:{name}" for name in ("unraisableexception", "threadexception")))
"""Whether they pass is all that is asked: of pytest's start, what tells why a test failed takes a third."""
SECONDS = 300
"""What a chapter's tests may take: learners' loops do not always end."""


def run_tests(
    chapters: Sequence[Chapter],
    folder: Path,
    *,
    without: Sequence[str] = (),
    first_only: bool = False,
    seconds: float = SECONDS,
    forks: Forks | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the chapters' tests with ``folder`` laid over the reference, ``without`` some definitions.

    ``first_only`` stops at the first failure; with ``forks`` it is one of their processes, and no new one.
    A return code above 1 says that the tests could not even start, one below 0 that a signal ended them.
    Raises ConfigError if pytest is not installed, or if the tests do not end.
    """
    if find_spec("pytest") is None:
        raise ConfigError("`course check` needs pytest: run `make course`, or pip install -e '.[test]'.")
    taught = {definition.partition(":")[0] for it in chapters for definition in it.teaches}
    environment = {
        **os.environ,
        VARIABLE: str(folder.resolve()),
        WITHOUT_VARIABLE: " ".join(without),
        QUICK_VARIABLE: " ".join(it for it in taught if "/" in it) or "none",
        "TINY_LLM_BACKEND": "ref",
        # A chapter's tests need none of the plugins that are installed, and those take longer than the tests.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    arguments = [f"--chapter={it.id}" for it in chapters]
    arguments += [*_QUIET, *dict.fromkeys(test for it in chapters for test in it.tests)]
    arguments += _BARE if first_only else []
    arguments += ["-o", f"faulthandler_timeout={seconds / 8:g}"]  # prints where it was, on stderr
    try:
        if forks is not None:
            return forks.run(arguments, environment, seconds)
        command = [sys.executable, "-m", "pytest", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as late:
        where = crash_site((late.stderr or b"").decode(errors="replace"))
        raise ConfigError(
            f"The tests did not end within {seconds:g} s: is there a loop that goes on for ever? {where}"
        ) from late


def crash_site(stderr: str) -> str:
    """Which test ran, by what faulthandler printed when it ended or hung; "" if it does not say."""
    found = re.findall(r'File "[^"]*(tests/[^"]+)", line (\d+) in (test_\w+)', stderr)
    return "It was in {2}, {0}:{1}.".format(*found[0]) if found else ""


def to_blame(
    chapter: Chapter, folder: Path, written: Sequence[str], without: Sequence[str] = ()
) -> Iterator[str]:
    """Yield each definition with which the tests pass once the reference stands in for it alone.

    ``without`` are those for which it stands in anyway.
    """
    with quick_runs() as forks:
        for definition in written:
            left_out = [*without, definition]
            done = run_tests([chapter], folder, without=left_out, first_only=True, forks=forks)
            if done.returncode == 0:
                yield definition


@contextmanager
def quick_runs() -> Iterator[Forks | None]:
    """What many runs of tests share; None where a fork of what MLX has loaded is not safe."""
    if sys.platform != "linux":
        yield None
        return
    with Forks() as forks:
        yield forks
