"""A learner's folder, and commands as a learner types them: in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from book.course.manifest import ROOT, read_manifest
from book.course.workbook import Workbook

Run = Callable[..., subprocess.CompletedProcess[str]]


def page_of(number: str) -> str:
    """A chapter's page."""
    return (ROOT / "book" / "docs" / read_manifest()[number].page).read_text(encoding="utf-8")


def tables_of(number: str) -> list[str]:
    """What a chapter's page says that its experiments and commands print."""
    return re.findall(r"^```text\n(.*?)^```$", page_of(number), re.S | re.M)


@pytest.fixture
def book(tmp_path: Path) -> Workbook:
    """A learner's empty folder."""
    return Workbook(tmp_path / "my_llm")


@pytest.fixture(scope="session")
def run() -> Run:
    """``run("-c", "...", TINY_LLM_COURSE=folder)``: python in the checkout."""

    def python(*arguments: object, **environment: object) -> subprocess.CompletedProcess[str]:
        ours = ("TINY_LLM_COURSE", "TINY_LLM_BACKEND")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        command = [sys.executable, *map(str, arguments)]
        added = {name: str(value) for name, value in environment.items()}
        return subprocess.run(command, cwd=ROOT, env={**kept, **added}, capture_output=True, text=True)

    return python
