"""What a kernel's author must not write, though it may well run here: found without running it.

Two passes: the text is parsed with Metal's real address spaces, and looked through for what Metal or the
house's rules forbid. Owns the rules; knows no device and no array.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tiny_llm.metalsim.build import parse
from tiny_llm.metalsim.source import Kernel, find_arrays, numbered, parsed_only, without_comments

_HEADER_AND_BODY: Sequence[tuple[str, str]] = (
    (r'#\s*include\s*(?!\s*<metal_\w+>)[<"][^\n]*', "includes something else than <metal_*>"),
    (r"\bdouble\b", "double: Metal has none"),
    (r"\bgoto\b", "goto: Metal has none"),
    (r"\b(?:new|delete|throw|try|virtual|dynamic_cast|typeid)\b", "C++ that Metal has not"),
    (r"\[[&=]?\]\s*(?:\([^()]*\)\s*)?(?:->\s*\w+\s*)?\{", "a lambda: not in every version of Metal"),
    (r"\bfunction_constant\b", "a function constant: MLX gives it no value"),
    (r"\bstd::", "std::: Metal's library is metal::"),
)
_BODY: Sequence[tuple[str, str]] = (
    (r"\bstatic\s+(?!constexpr|_?assert)\w+", "a static local"),
    (r"\bwhile\s*\([^)]*atomic_load", "a spin-wait: nothing promises that another thread goes on"),
)


def problems(kernel: Kernel) -> list[str]:
    """``FILE:LINE: what is wrong`` for each; none for a kernel that keeps the rules."""
    return [*_by_compiler(kernel), *_by_text(kernel)]


def _by_compiler(kernel: Kernel) -> Iterator[str]:
    for file, line, what in dict.fromkeys(parse(parsed_only(kernel))):
        if "/" in file:  # MLX's own header has an array parameter with an address space: no concern of ours
            continue
        if what.startswith("error: "):
            yield f"{file}:{line}: {what}"
        elif re.search(r"to '(?:__bf16|bfloat)", what):
            yield f"{file}:{line}: a number becomes bfloat by itself: write static_cast"


def _by_text(kernel: Kernel) -> Iterator[str]:
    body, header = without_comments(kernel.body), without_comments(kernel.header)
    for name, text, rules in (
        ("header", header, _HEADER_AND_BODY),
        ("source", body, (*_HEADER_AND_BODY, *_BODY)),
    ):
        for pattern, what in rules:
            for found in re.finditer(pattern, text):
                yield _at(name, text, found.start(), what)
    for found in find_arrays(header):
        yield _at("header", header, found.start(), "threadgroup memory outside of the kernel's body")
    for found in find_arrays(body):
        without_sizes = re.sub(r"\[[^\]]*\]", "[]", found["names"])  # a size may hold a comma of its own
        if re.search(r",\s*[A-Za-z_]\w*\s*(?:\[|$|,)", without_sizes):
            yield _at("source", body, found.start(), "two threadgroup arrays in one statement")
    for found in re.finditer(r"\bthreadgroup\s+[\w:]+\s+\w+\s*(?:\[[^\]]*\]\s*)*=", body):
        yield _at("source", body, found.start(), "threadgroup memory cannot be initialised")


def _at(name: str, text: str, place: int, what: str) -> str:
    """The rule's words at the line of the author's file."""
    *_, (file, number, _) = numbered(name, text[:place])
    return f"{file}:{number}: {what}"
