"""What a kernel's author must not write, though it may well run here: found without running it.

The text is parsed with Metal's real address spaces, and looked through for what Metal or the house's rules
forbid; what it leaves on the stack is asked of LLVM.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tiny_llm.metalsim.build import _clang_on, _compile, _diagnostics, _options
from tiny_llm.metalsim.source import Kernel, _cpp, find_arrays, numbered, without_comments

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


def parse(text: str) -> list[tuple[str, str, str]]:
    """File, line and words of all that clang says of C++ with Metal's address spaces, which is not run."""
    options = [o for o in _options("fast") if o not in ("-w", "-O2", "-ferror-limit=5")]
    wanted = ("-ferror-limit=0", "-DMSIM_CHECK=1", "-fsyntax-only", "-Wno-everything")
    return _diagnostics(_clang_on(text, [*options, *wanted, "-Wimplicit-float-conversion"]).stderr)


def parsed_only(kernel: Kernel) -> str:
    """C++ to be parsed with Metal's address spaces, each template made for this variant."""
    made = f"template decltype({kernel.call_name}) {kernel.call_name};\n" if kernel.template else ""
    return _cpp(kernel) + '#line 1 "entry"\n' + made


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


def stack_arrays(text: str) -> list[str]:
    """Arrays that the optimized code of the C++ ``text`` keeps on its stack, as LLVM says it; not our own.

    Raises CompileError.
    """
    inlined = ("-mllvm", "-inline-threshold=1000000")  # as Metal does with all functions
    options = [*_options("fast"), *inlined, "-emit-llvm", "-S", "-fno-discard-value-names", "-o", "-"]
    return re.findall(r"^ +%((?!msim_)\S+ = alloca \[.*\]),", _compile(text, options), re.M)
