"""The house's rules on the C++ side, kept by reading source and object files.

A rule takes files by their path and yields what is wrong; each is tried on a planted bad file.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "kernels" / "cpu"
MAX_FILE_LINES = 500
Files = Mapping[str, str]
Rule = Callable[[Files], Iterator[str]]
INCLUDES = re.compile(r'^#include\s+[<"]([^>"]+)', re.M)
# Headers of C, of compilers, and no others: a C++ template compiled for AVX-512 may become everybody's.
C_HEADERS = re.compile(r"(std(int|def|io|lib|bool|arg)|string|math|float|limits|\w+intrin|arm_\w+|assert)\.h")


def read_kernels(folder: Path) -> Files:
    """Each C++ file and list of them under ``folder``, by its path from there."""
    names = [*folder.glob("*.*"), *folder.glob("binding/*.*"), *folder.glob("tests/*.*")]
    kept = [n for n in names if n.suffix in (".cpp", ".h") or n.name in ("CMakeLists.txt", "bindings.h")]
    return {n.relative_to(folder).as_posix(): n.read_text(encoding="utf-8") for n in sorted(kept)}


def listed(files: Files, pattern: str) -> set[str]:
    """The .cpp files that CMakeLists.txt names in the first call that matches ``pattern``."""
    call = re.search(rf"{pattern}([^)]*)\)", files["CMakeLists.txt"])
    return set(re.findall(r"\S+\.cpp", call[1])) if call else set()


def kernels_of(files: Files) -> set[str]:
    """The files compiled once for each instruction set."""
    return listed(files, r"set\(KERNELS\s")


def sizes(files: Files) -> Iterator[str]:
    """Files stay small enough to read."""
    for path, text in files.items():
        lines = text.count("\n")
        if lines > MAX_FILE_LINES:
            yield f"{path}: {lines} lines; at most {MAX_FILE_LINES}"


def headers_say_what_they_own(files: Files) -> Iterator[str]:
    """A header begins with a comment, and is read once."""
    for path, text in files.items():
        if path.endswith(".h") and not re.match(r"//.*\n(//.*\n)*#pragma once", text):
            yield f"{path}: begins with a comment that says what it owns, then #pragma once"


def every_file_is_built(files: Files) -> Iterator[str]:
    """Each .cpp at the top is either a kernel or of the library; nothing listed is missing."""
    there = {path for path in files if path.endswith(".cpp") and "/" not in path}
    known = kernels_of(files) | listed(files, r"add_library\(kernels STATIC\s")
    for path in sorted(there - known):
        yield f"{path}: CMakeLists.txt does not build it"
    for path in sorted(known - there):
        yield f"CMakeLists.txt: builds {path}, which is not there"


def reached(files: Files, path: str) -> set[str]:
    """The files of ours that ``path`` includes, and what these include."""
    waiting, found = [path], set[str]()
    while waiting:
        for name in INCLUDES.findall(files[waiting.pop()]):
            name = name.removeprefix("../")
            if name in files and name not in found:
                found.add(name)
                waiting.append(name)
    return found


def every_kernel_is_bound_and_tested(files: Files) -> Iterator[str]:
    """The header that a kernel includes first is included by a test, and by a binding or another kernel."""
    kernels = kernels_of(files)
    bindings = {path for path in files if path.startswith("binding/")}
    tests = {path for path in files if path.startswith("tests/")}
    for kernel in sorted(kernels):
        header = next(iter(INCLUDES.findall(files.get(kernel, ""))), kernel)
        for users, what in ((bindings | (kernels & set(files)) - {kernel}, "binding"), (tests, "test")):
            if not any(header in reached(files, path) for path in users):
                yield f"{kernel}: no {what} includes {header}"


def every_binding_is_called(files: Files) -> Iterator[str]:
    """What bindings.h declares, the module calls."""
    for name in re.findall(r"void (bind_\w+)\(", files["binding/bindings.h"]):
        if f"{name}(m)" not in files["binding/module.cpp"]:
            yield f"binding/module.cpp: {name} is declared and not called"


def kernels_include_no_cpp_library(files: Files) -> Iterator[str]:
    """A kernel file, and what it includes of ours, includes C headers alone."""
    kernels = kernels_of(files) & set(files)
    for path in sorted(kernels.union(*(reached(files, kernel) for kernel in kernels))):
        for name in INCLUDES.findall(files[path]):
            if name not in files and not C_HEADERS.fullmatch(name):
                yield f"{path}: includes {name}, which is no C header"


RULES: Sequence[Rule] = (
    sizes,
    headers_say_what_they_own,
    every_file_is_built,
    every_kernel_is_bound_and_tested,
    every_binding_is_called,
    kernels_include_no_cpp_library,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    problems = list(rule(read_kernels(CPU)))
    assert not problems, f"{rule.__doc__}\n" + "\n".join(problems)


GOOD: Files = {
    "CMakeLists.txt": "set(KERNELS a.cpp\n  b.cpp)\nadd_library(kernels STATIC pool.cpp ${VARIANTS})\n",
    "a.cpp": '#include "a.h"\n#include <math.h>\n',
    "a.h": "// Owns a.\n// And more.\n#pragma once\n",
    "b.cpp": '#include "b.h"\n',
    "b.h": '// Owns b.\n#pragma once\n#include "a.h"\n',
    "pool.cpp": "#include <vector>\n",
    "binding/bindings.h": "// All.\n#pragma once\nvoid bind_a(nb::module_& m);\n",
    "binding/module.cpp": "bind_a(m);\n",
    "binding/a.cpp": '#include "../a.h"\n#include "../b.h"\n',
    "tests/test_a.cpp": '#include "../a.h"\n#include "../b.h"\n',
}
PLANTED: Sequence[tuple[Rule, str, str, str]] = (
    (sizes, "pool.cpp", "\n" * 501, "pool.cpp: 501 lines"),
    (headers_say_what_they_own, "a.h", "#pragma once\n", "a.h: begins with a comment"),
    (headers_say_what_they_own, "a.h", "// Owns a.\n#include <math.h>\n", "a.h: begins with a comment"),
    (every_file_is_built, "c.cpp", "", "c.cpp: CMakeLists.txt does not build it"),
    (every_kernel_is_bound_and_tested, "tests/test_a.cpp", '#include "../a.h"\n', "b.cpp: no test includes"),
    (every_kernel_is_bound_and_tested, "binding/a.cpp", '#include "../a.h"\n', "b.cpp: no binding includes"),
    (every_binding_is_called, "binding/module.cpp", "", "bind_a is declared and not called"),
    (kernels_include_no_cpp_library, "b.h", "#include <algorithm>\n", "b.h: includes algorithm"),
    (kernels_include_no_cpp_library, "a.cpp", "#include <cmath>\n", "a.cpp: includes cmath"),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_good_files(rule: Rule) -> None:
    assert list(rule(GOOD)) == []


@pytest.mark.parametrize(
    ("rule", "path", "text", "complaint"), PLANTED, ids=[row[0].__name__ for row in PLANTED]
)
def test_rule_sees_what_is_planted(rule: Rule, path: str, text: str, complaint: str) -> None:
    problems = list(rule({**GOOD, path: text}))
    assert len(problems) == 1, problems
    assert complaint in problems[0]


def shared_code(isa: str, symbols: str) -> Iterator[str]:
    """What the linker may merge with another's: weak symbols outside of the variant's own namespace.

    ``symbols`` is what nm prints. A constructor of a static object would run at load, on any machine.
    """
    own = f"8tiny_llm{len(isa)}{isa}"
    for line in symbols.splitlines():
        found = re.fullmatch(r"(?:\S+)?\s*([A-Za-z]) (\S+)", line)
        if found and found[1] in "WVu" and own not in found[2]:
            yield f"{isa}: {found[2]} may become every variant's: make it static, or put it into TINY_ISA"
        if found and "_GLOBAL__sub_I" in found[2]:
            yield f"{isa}: {found[2]} runs when the module is loaded"


def compiled_variants() -> dict[str, list[Path]]:
    """The kernels' object files of each instruction set beyond the portable one, where they lie."""
    found: dict[str, list[Path]] = {}
    for build in (CPU, ROOT / "build" / "kernels-test"):  # the latter where no module was built
        for folder in sorted((build / "CMakeFiles").glob("kernels_*.dir")):
            isa = folder.stem.removeprefix("kernels_")
            if isa != "portable":
                found.setdefault(isa, []).extend(folder.glob("*.o"))
    return found


def test_no_variant_leaks_into_the_others() -> None:
    variants = compiled_variants()
    if not variants or not shutil.which("nm"):
        pytest.skip("no object files of several instruction sets here: make kernels-test builds them")
    for isa, objects in variants.items():
        symbols = subprocess.run(["nm", *objects], capture_output=True, text=True, check=True).stdout
        kernels = f"{isa}16quantized_matmul", f"{isa}11tile_matmul"  # some variants have but one of them
        assert any(kernel in symbols for kernel in kernels), f"nm sees no kernel in {isa}"
        problems = list(shared_code(isa, symbols))
        assert not problems, "\n" + "\n".join(problems)


def test_a_leak_is_seen() -> None:
    symbols = (
        "rms_norm.cpp.o:\n0000000000000000 T _ZN8tiny_llm6avx5128rms_normERKNS_7RmsNormE\n"
        "                 U memcpy\n0000000000000000 W _ZN8tiny_llm6avx5123foldIfEEvT_\n"
    )
    assert list(shared_code("avx512", symbols)) == []
    leak = "0000000000000000 W _ZSt3maxIfERKT_S2_S2_\n"
    assert "_ZSt3maxIfERKT_S2_S2_ may become" in next(shared_code("avx512", symbols + leak))
    assert list(shared_code("avx2", symbols)), "another variant's namespace is not one's own"
    assert "runs when" in next(shared_code("avx512", "0000000000000000 t _GLOBAL__sub_I_x\n"))
