"""Owns results that are too long for a prompt: kept in files, shown by head, tail and range."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from tiny_llm.agent.action import AgentTool, Arguments, Outcome, Prepared
from tiny_llm.agent.files import lines_of
from tiny_llm.agent.workspace import digest_of
from tiny_llm.errors import RequestError

_NAME = 12  # characters of a digest by which a result is called


class _Recall(Arguments):
    result: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$", description="its name, as it was shown")]
    first: Annotated[int, Field(ge=1, description="first line, from 1")]
    last: Annotated[int, Field(ge=1, description="last line")]


class Results:
    """Texts in ``folder``, by their digests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, text: str) -> str:
        """Keep a result; return its name."""
        name = digest_of(text.encode(errors="replace"))[:_NAME]
        self._folder.mkdir(exist_ok=True)
        (self._folder / name).write_text(text, encoding="utf-8", errors="replace")
        return name

    def tool(self) -> AgentTool:
        """The action that shows lines of a result again."""

        def prepare(given: _Recall) -> Prepared:
            path = self._folder / given.result
            if not path.is_file():
                raise RequestError(f"There is no result {given.result!r}; give a name as it was shown.")

            def perform() -> Outcome:
                return Outcome(lines_of(path.read_text(encoding="utf-8"), given.first, given.last))

            return Prepared(f"recall {given.result}, lines {given.first} to {given.last}", perform)

        return AgentTool.of("recall", "Show lines of an earlier result.", _Recall, prepare)


def shortened(text: str, name: str, most: int) -> str:
    """A result as a prompt shows it: whole if it has at most ``most`` characters, else its head and tail."""
    if len(text) <= most:
        return text
    head, tail = text[: most * 2 // 3], text[-(most // 3) :]
    lines = text.count("\n") + 1
    first, last = head.count("\n") + 1, lines - tail.count("\n")
    return "\n".join(
        [
            f"[result {name}: {lines} lines, {len(text):,} characters]",
            head,
            f"[... lines {first} to {last} are not shown whole; recall shows them ...]",
            tail,
        ]
    )
