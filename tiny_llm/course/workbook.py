"""Owns a learner's folder: a file for each module that they work on, and what they have checked.

Never overwrites what a learner wrote. Knows no test.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path

from tiny_llm.course.excerpt import added, find, heading, mutated, parameters, stub, whole
from tiny_llm.course.manifest import ROOT, Chapter, Mutant
from tiny_llm.course.merge import functions, is_stub
from tiny_llm.errors import ConfigError

PROGRESS = ".course.json"


def module_file(folder: Path, module: str) -> Path:
    """Where ``tiny_llm.ops.rope`` lies: ``folder/ops/rope.py``."""
    return folder.joinpath(*module.split(".")[1:]).with_suffix(".py")


def reference(module: str) -> str:
    """The reference's text of a module."""
    return module_file(ROOT / "tiny_llm", module).read_text(encoding="utf-8")


def in_parts(definition: str) -> tuple[str, str]:
    """``module:name`` as its two parts."""
    module, _, name = definition.partition(":")
    return module, name


@dataclass(frozen=True)
class Workbook:
    """A learner's folder."""

    folder: Path

    def text(self, module: str) -> str:
        """A module's file, or "". Raises ConfigError if it is not UTF-8 or not Python."""
        path = module_file(self.folder, module)
        if not path.is_file():
            return ""
        try:
            text = path.read_text(encoding="utf-8")
            ast.parse(text, str(path))
        except SyntaxError as error:
            raise ConfigError(f"{path}:{error.lineno}: {error.msg}; mend it, then try again.") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8.") from error
        return text

    def start(self, chapter: Chapter) -> tuple[list[str], list[str]]:
        """Add a stub for each taught definition that is not there; return those added and those kept."""
        new, kept = list[str](), list[str]()
        for definition in chapter.teaches:
            module, name = in_parts(definition)
            if find(self.text(module), name) is not None:
                kept.append(definition)
                continue
            self._add(definition, stub(reference(module), name, chapter.id))
            new.append(definition)
        return new, kept

    def fill(self, definitions: Sequence[str]) -> None:
        """Add the reference's text of each definition."""
        for definition in definitions:
            module, name = in_parts(definition)
            self._add(definition, whole(reference(module), name))

    def add_mutant(self, mutant: Mutant) -> None:
        """Add the reference's definition with one mistake in it."""
        module, name = in_parts(mutant.definition)
        self._add(mutant.definition, mutated(reference(module), name, mutant.old, mutant.new))

    def _add(self, definition: str, written: str) -> None:
        module, name = in_parts(definition)
        path, source = module_file(self.folder, module), reference(module)
        text = self.text(module)
        if not text:
            about = f"My {module}: what stands here runs in place of the reference's."
            text = heading(source, about)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(added(text, source, name, written), encoding="utf-8")

    def stubs(self, chapter: Chapter) -> list[str]:
        """The chapter's definitions that are missing or not yet written."""
        found = {d: find(self.text(in_parts(d)[0]), in_parts(d)[1]) for d in chapter.teaches}
        return [definition for definition, node in found.items() if node is None or is_stub(node)]

    def written(self) -> list[str]:
        """Every definition that runs in place of one of the reference's."""
        modules = [
            ".".join(["tiny_llm", *path.relative_to(self.folder).with_suffix("").parts])
            for path in sorted(self.folder.rglob("*.py"))
        ]
        known = [m for m in modules if module_file(ROOT / "tiny_llm", m).is_file()]
        return [definition for module in known for definition in self._written_in(module)]

    def _written_in(self, module: str) -> Iterator[str]:
        names = dict(functions(ast.parse(reference(module))))
        for name, node in functions(ast.parse(self.text(module))):
            if name in names and not is_stub(node):
                yield f"{module}:{name}"

    def drifted(self) -> Iterator[str]:
        """A line for each definition whose parameters are no longer those of the reference."""
        for definition in self.written():
            module, name = in_parts(definition)
            own, theirs = find(self.text(module), name), find(reference(module), name)
            assert own is not None and theirs is not None
            if parameters(own) != parameters(theirs):
                mine, now = (", ".join(parameters(node)) for node in (own, theirs))
                yield f"{name}({mine}) is called as {name}({now}) now: change its parameters."

    def diff(self, chapter: Chapter) -> str:
        """What leads from the learner's definitions to the reference's, as a unified diff."""
        lines = list[str]()
        for definition in chapter.teaches:
            module, name = in_parts(definition)
            text = self.text(module)
            mine = whole(text, name) if find(text, name) else ""
            ours = whole(reference(module), name).splitlines(keepends=True)
            labels = f"yours: {definition}", f"reference: {definition}"
            lines += unified_diff(mine.splitlines(keepends=True), ours, *labels)
        return "".join(lines)

    def state(self, chapter: Chapter) -> str:
        """How far the chapter is, in a word or two."""
        missing = len(self.stubs(chapter))
        if not missing:
            passed = self._progress().get(chapter.id)
            return "to be checked" if passed is None else self._since(chapter, passed)
        started = any(find(self.text(m), n) for m, n in map(in_parts, chapter.teaches))
        return (
            f"{len(chapter.teaches) - missing} of {len(chapter.teaches)} written" if started else "not begun"
        )

    def _since(self, chapter: Chapter, passed: str) -> str:
        return "done" if passed == self._digest(chapter) else "changed since checked"

    def mark_done(self, chapter: Chapter) -> None:
        """Remember that the chapter's tests passed on the code as it is."""
        progress = {**self._progress(), chapter.id: self._digest(chapter)}
        (self.folder / PROGRESS).write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")

    def _digest(self, chapter: Chapter) -> str:
        texts = (whole(self.text(module), name) for module, name in map(in_parts, chapter.teaches))
        return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]

    def _progress(self) -> dict[str, str]:
        path = self.folder / PROGRESS
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON any more; delete it, and check again.") from error
        return {str(key): str(value) for key, value in dict(found).items()}
