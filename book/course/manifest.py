"""Owns book/chapters: which chapters there are, what each teaches, and how it is checked.

Knows nothing of a learner's files. The course needs a checkout: its tests and pages are not installed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_llm.errors import ConfigError, did_you_mean

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""


@dataclass(frozen=True)
class Mutant:
    """A plausible mistake: ``old`` becomes ``new`` in the reference's ``definition``."""

    name: str
    definition: str
    old: str
    new: str
    symptom: str


@dataclass(frozen=True)
class Chapter:
    """One chapter. ``teaches`` holds ``module:qualified name``; ``tests`` are files from the checkout.

    ``hints`` are those of each task, by its qualified name. A chapter that teaches nothing is one to read,
    and its tests keep true what it says.
    """

    id: str
    title: str
    page: str
    minutes: int
    needs: Sequence[str]
    tests: Sequence[str]
    teaches: Sequence[str]
    hints: Mapping[str, Sequence[str]]
    mutants: Sequence[Mutant]


def read_manifest(root: Path = ROOT) -> Mapping[str, Chapter]:
    """Return the chapters by id, in their order. Raises ConfigError without a checkout."""
    folder = root / "book" / "chapters"
    if not folder.is_dir():
        raise ConfigError(f"There is no {folder}; the course needs a checkout of tiny_llm: run it there.")
    texts = (path.read_text(encoding="utf-8") for path in folder.glob("*.toml"))
    chapters = [_chapter(tomllib.loads(text)) for text in texts]
    return {it.id: it for it in sorted(chapters, key=lambda it: [int(part) for part in it.id.split(".")])}


def _chapter(row: Mapping[str, Any]) -> Chapter:
    mutants = tuple(Mutant(**mutant) for mutant in row.get("mutant", ()))
    facts = {name: value for name, value in row.items() if name != "mutant"}
    return Chapter(**{"hints": {}} | facts, mutants=mutants)


def chapter(chapters: Mapping[str, Chapter], given: str) -> Chapter:
    """Return the chapter ``given``; raises ConfigError with those that there are."""
    if given not in chapters:
        near = did_you_mean(given, chapters) if re.fullmatch(r"\d+\.\d+", given) else ""
        raise ConfigError(f"There is no chapter {given!r}; there are {', '.join(chapters)}.{near}")
    return chapters[given]
