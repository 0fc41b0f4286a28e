"""Owns a native file's parts as text: what stands between ``// begin 2.3 name`` and ``// end 2.3``.

The counterpart of ``excerpt`` for files that are no Python. Knows no compiler.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from book.course.merge import STUB
from tiny_llm.errors import ConfigError

_SECTION = re.compile(
    r"^// begin (?P<chapter>\d+\.\d+) (?P<name>\w+)\n.*?^// end (?P=chapter)\n", re.S | re.M
)
_SIGNATURE = re.compile(r"^(?!//)\S[^{;]*\{$", re.M)


def definitions(source: str) -> Mapping[str, bool]:
    """Each part's name, and whether it is still what ``course start`` wrote."""
    return {found["name"]: STUB in found[0] for found in _SECTION.finditer(source)}


def check(source: str, path: str) -> None:
    """Raises ConfigError if a mark has lost its other half."""
    marks = len(re.findall(r"^// (?:begin|end) \d+\.\d+", source, re.M))
    if marks != 2 * len(definitions(source)):
        raise ConfigError(
            f"{path}: a mark is missing; each part begins with a line `// begin 2.3 name` and ends with "
            "a line `// end 2.3`; `course start` writes them."
        )


def whole(source: str, name: str) -> str:
    """A part with its marks. Raises ConfigError if there is none."""
    for found in _SECTION.finditer(source):
        if found["name"] == name:
            return found[0]
    raise ConfigError(f"There is no {name} in the reference any more; book/chapters names it.")


def stub(source: str, name: str, chapter: str) -> str:
    """A part up to its first function's brace, and a body that says what is to be done."""
    text = whole(source, name)
    signature = _SIGNATURE.search(text)
    assert signature is not None, f"{name} has no function"
    body = "" if "void" in signature[0].partition("(")[0].split() else "return {};  "
    return f"{text[: signature.end()]}\n    {body}// {STUB} {chapter})\n}}\n// end {chapter}\n"


def heading(source: str, about: str) -> str:
    """How a learner's file begins."""
    return (
        f"// {about}\n// Parts between marks are compiled in place of its own; helpers go between them too.\n"
    )


def added(text: str, reference: str, name: str, definition: str) -> str:
    """Put a part at the end of a learner's ``text``."""
    return f"{text.rstrip()}\n\n{definition}"


def parameters(source: str, name: str) -> Sequence[str]:
    """The types and names of the parameters of a part's first function."""
    signature = _SIGNATURE.search(whole(source, name))
    listed = signature[0].partition("(")[2].rpartition(")")[0] if signature else ""
    return tuple(" ".join(parameter.split()) for parameter in listed.split(","))


def merged(reference: str, path: str, own: str, own_path: str, without: Collection[str]) -> str:
    """``reference`` with the parts of ``own`` in their places, but for stubs and ``without``.

    A compiler speaks of each line as of the file where it was written.
    """
    theirs = {name for name, is_stub in definitions(own).items() if not is_stub and name not in without}

    def part(found: re.Match[str]) -> str:
        if found["name"] not in theirs:
            return found[0]
        text = whole(own, found["name"])
        first, after = _line(own, own.index(text)), _line(reference, found.end())
        return f'#line {first} "{own_path}"\n{text}#line {after} "{path}"\n'

    return f'#line 1 "{path}"\n' + _SECTION.sub(part, reference)


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
