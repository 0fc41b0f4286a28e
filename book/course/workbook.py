"""Owns a learner's folder: a file for each module that they work on, and what they have checked.

Never overwrites what a learner wrote. Knows no test.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path
from typing import Protocol

from book.course import excerpt, sections
from book.course.manifest import ROOT, Chapter, Mutant
from tiny_llm.errors import ConfigError

PROGRESS = ".course.json"
_AT = "at"


class Language(Protocol):
    """How definitions are cut from, and put into, texts of one language: ``excerpt`` and ``sections``.

    Sources come first, then names. ``definitions``: each one's name, and whether it is a stub. ``check``
    raises ConfigError for a source, of that path, that cannot be read. ``whole`` is a definition's text,
    ``stub`` that without its body, for a chapter. ``heading`` begins a learner's file about something.
    ``added``: a learner's text, by the reference, with a name's definition more.
    """

    definitions: Callable[[str], Mapping[str, bool]]
    check: Callable[[str, str], None]
    whole: Callable[[str, str], str]
    stub: Callable[[str, str, str], str]
    heading: Callable[[str, str], str]
    added: Callable[[str, str, str, str], str]
    parameters: Callable[[str, str], Sequence[str]]


def is_native(module: str) -> bool:
    """Whether a module is a kernel's file, as ``kernels/cpu/<name>.cpp``, not ``tiny_llm.<name>``."""
    return "/" in module


def language(module: str) -> Language:
    """What a module is written in."""
    return sections if is_native(module) else excerpt


def module_file(folder: Path, module: str) -> Path:
    """Where ``tiny_llm.ops.rope`` lies: ``folder/ops/rope.py``; a kernel's file keeps its path."""
    if is_native(module):
        return folder / module
    return folder.joinpath(*module.split(".")[1:]).with_suffix(".py")


def reference(module: str) -> str:
    """The reference's text of a module."""
    root = ROOT if is_native(module) else ROOT / "tiny_llm"
    return module_file(root, module).read_text(encoding="utf-8")


def whole(module: str, name: str) -> str:
    """The reference's text of a definition."""
    return language(module).whole(reference(module), name)


def in_parts(definition: str) -> tuple[str, str]:
    """``module:name`` as its two parts."""
    module, _, name = definition.partition(":")
    return module, name


@dataclass(frozen=True)
class Workbook:
    """A learner's folder."""

    folder: Path

    def text(self, module: str) -> str:
        """A module's file, or "". Raises ConfigError if it is not UTF-8 or cannot be read as what it is."""
        path = module_file(self.folder, module)
        if not path.is_file():
            return ""
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8.") from error
        language(module).check(text, str(path))
        return text

    def definitions(self, module: str) -> Mapping[str, bool]:
        """What stands in a module's file, and whether each is still a stub."""
        return language(module).definitions(self.text(module))

    def start(self, chapter: Chapter) -> tuple[list[str], list[str]]:
        """Add a stub for each taught definition that is not there; return those added and those kept."""
        new, kept = list[str](), list[str]()
        for definition in chapter.teaches:
            module, name = in_parts(definition)
            if name in self.definitions(module):
                kept.append(definition)
                continue
            self._add(definition, language(module).stub(reference(module), name, chapter.id))
            new.append(definition)
        self.be_at(chapter)
        return new, kept

    def fill(self, definitions: Sequence[str]) -> None:
        """Add the reference's text of each definition."""
        for definition in definitions:
            self._add(definition, whole(*in_parts(definition)))

    def add_mutant(self, mutant: Mutant) -> None:
        """Add the reference's definition with one mistake in it.

        Raises ConfigError unless the text that the mutant replaces is there exactly once.
        """
        text = whole(*in_parts(mutant.definition))
        if (times := text.count(mutant.old)) != 1:
            raise ConfigError(
                f"The mutant {mutant.name} replaces {mutant.old!r}, which is there {times} times."
            )
        self._add(mutant.definition, text.replace(mutant.old, mutant.new))

    def _add(self, definition: str, written: str) -> None:
        module, name = in_parts(definition)
        path, source = module_file(self.folder, module), reference(module)
        text = self.text(module)
        if not text:
            about = f"My {module}: what stands here runs in place of the reference's."
            text = language(module).heading(source, about)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(language(module).added(text, source, name, written), encoding="utf-8")

    def stubs(self, chapter: Chapter) -> list[str]:
        """The chapter's definitions that are missing or not yet written."""
        parts = [(definition, *in_parts(definition)) for definition in chapter.teaches]
        return [definition for definition, module, name in parts if self.definitions(module).get(name, True)]

    def written(self) -> list[str]:
        """Every definition that runs in place of one of the reference's."""
        return [definition for module in self._modules() for definition in self._written_in(module)]

    def kernels(self) -> list[str]:
        """The kernel files of which something is written."""
        return [m for m in self._modules() if is_native(m) and list(self._written_in(m))]

    def _modules(self) -> Iterator[str]:
        """The modules of ours of which there is a file."""
        for path in sorted(self.folder.rglob("*.py")):
            module = ".".join(["tiny_llm", *path.relative_to(self.folder).with_suffix("").parts])
            if module_file(ROOT / "tiny_llm", module).is_file():
                yield module
        for path in sorted(self.folder.glob("kernels/*/*.*")):
            if (ROOT / (module := path.relative_to(self.folder).as_posix())).is_file():
                yield module

    def _written_in(self, module: str) -> Iterator[str]:
        known = language(module).definitions(reference(module))
        for name, is_stub in self.definitions(module).items():
            if name in known and not is_stub:
                yield f"{module}:{name}"

    def drifted(self) -> Iterator[str]:
        """A line for each definition whose parameters are no longer those of the reference."""
        for definition in self.written():
            module, name = in_parts(definition)
            own, theirs = (
                language(module).parameters(text, name) for text in (self.text(module), reference(module))
            )
            if own != theirs:
                mine, now = ", ".join(own), ", ".join(theirs)
                yield f"{name}({mine}) is called as {name}({now}) now: change its parameters."

    def diff(self, chapter: Chapter) -> str:
        """What leads from the learner's definitions to the reference's, as a unified diff."""
        lines = list[str]()
        for definition in chapter.teaches:
            module, name = in_parts(definition)
            mine = self._own(module, name) if name in self.definitions(module) else ""
            ours = whole(module, name).splitlines(keepends=True)
            labels = f"yours: {definition}", f"reference: {definition}"
            lines += unified_diff(mine.splitlines(keepends=True), ours, *labels)
        return "".join(lines)

    def state(self, chapter: Chapter) -> str:
        """How far the chapter is, in a word or two."""
        missing = len(self.stubs(chapter))
        if not missing:
            passed = self._progress().get(chapter.id)
            if passed is None:
                return "to be checked" if chapter.teaches else "to be read"
            return "done" if passed == self._digest(chapter) else "changed since checked"
        started = any(n in self.definitions(m) for m, n in map(in_parts, chapter.teaches))
        return (
            f"{len(chapter.teaches) - missing} of {len(chapter.teaches)} written" if started else "not begun"
        )

    def mark_done(self, chapter: Chapter) -> None:
        """Remember that the chapter's tests passed on the code as it is."""
        self._remember(chapter.id, self._digest(chapter))

    def be_at(self, chapter: Chapter) -> None:
        """Remember that the learner is at this chapter."""
        self._remember(_AT, chapter.id)

    def at(self) -> str | None:
        """The number of the chapter that the learner was last at."""
        return self._progress().get(_AT)

    def _remember(self, key: str, value: str) -> None:
        progress = {**self._progress(), key: value}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / PROGRESS).write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")

    def _own(self, module: str, name: str) -> str:
        return language(module).whole(self.text(module), name)

    def _digest(self, chapter: Chapter) -> str:
        texts = (self._own(module, name) for module, name in map(in_parts, chapter.teaches))
        return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]

    def _progress(self) -> dict[str, str]:
        path = self.folder / PROGRESS
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON any more; delete it, and check again.") from error
        return {str(key): str(value) for key, value in dict(found).items()}
