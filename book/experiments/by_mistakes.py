"""What an experiment tells with a chapter's mistakes in the code, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from command_line import parser_of

from book.course.manifest import read_manifest
from book.course.workbook import Workbook


def told_with(
    script: str, chapter: str, names: Iterable[str], option: str = "--story"
) -> Iterator[tuple[str, str]]:
    """Each of a chapter's mistakes by name, and what ``script`` prints with it; first that without any.

    Several at once are joined by " + ". Where it prints nothing, the last line of its error stands for it.
    """
    mutants = {mutant.name: mutant for mutant in read_manifest()[chapter].mutants}
    for name in ("", *names):
        with tempfile.TemporaryDirectory() as folder:
            for one in name.split(" + ") if name else ():
                Workbook(Path(folder)).add_mutant(mutants[one])
            environment = {**os.environ, "TINY_LLM_COURSE": folder}
            command = [sys.executable, script, option]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        yield name or "(none)", done.stdout.rstrip() or done.stderr.strip().splitlines()[-1]


def show(
    about: str | None,
    table: Callable[[], str],
    picture: Callable[[], str],
    mistakes: Callable[[], str],
    story: Callable[[], str],
) -> None:
    """The command line of such an experiment: print the table and draw, or one of the other two."""
    parser = parser_of(about)
    parser.add_argument("--mistakes", action="store_true")
    parser.add_argument("--story", action="store_true")
    arguments = parser.parse_args()
    if arguments.mistakes or arguments.story:
        print(mistakes() if arguments.mistakes else story())
        return
    print(table())
    if arguments.svg:
        arguments.svg.write_text(picture(), encoding="utf-8")
