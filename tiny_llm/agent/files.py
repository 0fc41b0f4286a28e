"""Owns the actions on files: read a range of lines, search, and edit by a diff that must apply."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import unified_diff
from typing import Annotated

from pydantic import Field

from tiny_llm.agent.action import AgentTool, Arguments, Outcome, Prepared
from tiny_llm.agent.workspace import FileAbsent, Workspace, digest_of, require_own
from tiny_llm.errors import RequestError

_MOST_HITS, _LINE = 100, 300
_Path = Annotated[str, Field(description="from the workspace's root")]


class _Range(Arguments):
    path: _Path
    first: Annotated[int, Field(ge=1, description="first line, from 1")]
    last: Annotated[int, Field(ge=1, description="last line")]


class _Search(Arguments):
    text: Annotated[str, Field(description='found as it is; "" lists all files')]


class _Edit(Arguments):
    path: _Path
    old: Annotated[str, Field(description='text that is in the file exactly once; "" for a new file')]
    new: Annotated[str, Field(description="what stands there then")]


def file_tools(workspace: Workspace) -> list[AgentTool]:
    """read, search and edit in ``workspace``."""

    def read(given: _Range) -> Prepared:
        def perform() -> Outcome:
            return Outcome(lines_of(_text(workspace.read(given.path), given.path), given.first, given.last))

        return Prepared(f"read {given.path}, lines {given.first} to {given.last}", perform)

    def search(given: _Search) -> Prepared:
        def perform() -> Outcome:
            if not given.text:
                return Outcome("\n".join(workspace.files()) or "no files")
            hits = list(_hits(workspace, given.text))
            more = ["... and more: search for a longer text"] if len(hits) > _MOST_HITS else []
            return Outcome("\n".join(hits[:_MOST_HITS] + more) or "not found")

        return Prepared(f"search {given.text!r}", perform)

    def edit(given: _Edit) -> Prepared:
        before, old = _before(workspace, given)
        new = old.replace(given.old, given.new, 1) if given.old else given.new
        data = new.encode()
        digest = digest_of(data)
        diff = unified_diff(old.splitlines(), new.splitlines(), given.path, given.path, lineterm="")

        def perform() -> Outcome:
            workspace.write(given.path, data, before)
            return Outcome(f"{given.path} is changed.", 0, digest)

        return Prepared(f"edit {given.path}", perform, "\n".join(diff), before, digest)

    def digest(given: _Edit) -> str:
        return workspace.digest(given.path)

    return [
        AgentTool.of("read", "Show lines of a file.", _Range, read),
        AgentTool.of("search", "Find a text in all files: path, line number, line.", _Search, search),
        AgentTool.of("edit", "Change a file.", _Edit, edit, has_effect=True, digest=digest),
    ]


def lines_of(text: str, first: int, last: int) -> str:
    """Lines ``first`` to ``last``, and how many there are."""
    lines = text.split("\n")
    chosen = lines[first - 1 : last]
    return "\n".join([f"[lines {first} to {first + len(chosen) - 1} of {len(lines)}]", *chosen])


def _text(data: bytes, path: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is no UTF-8 text.") from error


def _hits(workspace: Workspace, text: str) -> Iterator[str]:
    """Every line with ``text``, of files that are text; one more than are shown."""
    count = 0
    for path in workspace.files():
        try:
            lines = workspace.read(path).decode().split("\n")
        except (RequestError, UnicodeDecodeError):  # too large, gone meanwhile, or no text
            continue
        for number, line in enumerate(lines, 1):
            if text in line:
                yield f"{path}:{number}: {line[:_LINE]}"
                count += 1
                if count > _MOST_HITS:
                    return


def _before(workspace: Workspace, given: _Edit) -> tuple[str, str]:
    """The digest and text that an edit applies to. Raises RequestError if it does not apply."""
    require_own(given.path)
    try:
        data = workspace.read(given.path)
    except FileAbsent:
        if given.old:
            raise
        return "", ""
    text = _text(data, given.path)
    number = text.count(given.old) if given.old else 0
    if number != 1:
        there = "the file is there already" if not given.old else f"it is there {number} times"
        what = f"The edit of {given.path} does not apply: old must be in it exactly once, but {there}."
        raise RequestError(f"{what} Read the file, and give old as it stands, with more around it.")
    if given.old == given.new:
        raise RequestError(f"The edit of {given.path} changes nothing: old and new are the same.")
    return digest_of(data), text
