"""Owns the import finder that puts a learner's definitions into the package's modules as they load.

``TINY_LLM_COURSE=<folder>`` installs it, in child processes too. Knows no chapter. It comes before
every module of the package, so it imports the standard library and ``merge`` alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from book.course.merge import merged_code

VARIABLE = "TINY_LLM_COURSE"
BACKEND_VARIABLE = "TINY_LLM_BACKEND"
WITHOUT_VARIABLE = "TINY_LLM_COURSE_WITHOUT"
"""Definitions to take from the reference all the same, as ``module:name``, between spaces."""
QUICK_VARIABLE = "TINY_LLM_COURSE_QUICK"
"""In checks, the kernel files that are checked: a learner's C++ is compiled fast and runs slowly."""

BRIDGES: Mapping[str, str] = {
    "tiny_llm.ops.attention": "kernels/cpu/attention.cpp",
    "tiny_llm.ops.metal": "kernels/metal",
    "tiny_llm.ops.quantized_matmul": "kernels/cpu/quantized_rows.cpp",
    "tiny_llm.ops.rms_norm": "kernels/cpu/rms_norm.cpp",
    "tiny_llm.ops.rope": "kernels/cpu/rope.cpp",
    "tiny_llm.ops.swiglu": "kernels/cpu/swiglu.cpp",
}
"""Modules that a file of ``bridges`` makes run a learner's kernel, where there is that file or folder.

C++ runs in place of Python that the learner may have written too. So in checks it is left out, unless it is
what is checked.
"""


def install(folder: str) -> None:
    """Make each module with a file in ``folder`` load with that file's definitions.

    Without another choice the backend is ``ref``: kernels would run in place of what was written. ("" is
    a choice, too: the best that there is.)
    Raises ImportError if ``folder`` is none, or modules that it could change are loaded already.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise ImportError(f"{VARIABLE} is {folder!r}, which is no folder; `course start` makes one.")
    loaded = [name for name in sys.modules if name.startswith("tiny_llm.")]
    if loaded:
        raise ImportError(f"{VARIABLE} must be set before tiny_llm is imported; {loaded[0]} is loaded.")
    os.environ.setdefault(BACKEND_VARIABLE, "ref")
    sys.meta_path.insert(0, _Finder(root, os.environ.get(WITHOUT_VARIABLE, "").split()))


class _Finder(MetaPathFinder):
    def __init__(self, root: Path, without: Collection[str]) -> None:
        self._root, self._without = root, without

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The reference's spec with our loader, for a module of which the learner has a file."""
        package, *inner = fullname.split(".")
        owns = [self._root.joinpath(*inner).with_suffix(".py")]
        if fullname in BRIDGES and self._is_run(BRIDGES[fullname]):
            owns.append(Path(__file__).with_name("bridges") / f"{inner[-1]}.py")
        owns = [own for own in owns if own.is_file()]
        if package != "tiny_llm" or not inner or not owns:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            without = [name.partition(":")[2] for name in self._without if name.startswith(f"{fullname}:")]
            spec.loader = _Loader(fullname, spec.origin, owns, without)
        return spec

    def _is_run(self, kernel: str) -> bool:
        checked = os.environ.get(QUICK_VARIABLE)
        left_out = checked is not None and kernel.endswith(".cpp") and kernel not in checked.split()
        return (self._root / kernel).exists() and not left_out


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, owns: Sequence[Path], without: Collection[str]) -> None:
        super().__init__(fullname, path)
        self._owns, self._without = owns, without

    def get_code(self, fullname: str) -> CodeType:
        """The merged code: never read from, nor written to, the cache of compiled files."""
        reference = Path(self.path).read_text(encoding="utf-8")
        owns = [(own.read_text(encoding="utf-8"), str(own)) for own in self._owns]
        return merged_code(reference, self.path, owns, self._without)
