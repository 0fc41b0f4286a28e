"""What git tracks: text at home on any machine, every file in MAP.md, every import declared."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Written with [] so that this file does not trip over itself.
FORBIDDEN_TEXT: Mapping[str, str] = {
    r"(?<![\w.])/(?:wor[k]|far[m]|roo[t])/": "a path of one developer's machine",
    r"(?<![\w.])/(?:hom[e]|User[s])/[a-z]\w*": "a path of one developer's machine",
    r"/tm[p]/(?:[a-z]?en[v]|brie[f])/": "a path of one developer's machine",
    r"pyp[i]\.org|pythonhoste[d]\.org|npmj[s]\.(?:org|com)": "a package registry's host",
}
LOCK_FILES = re.compile(r"(\.lock|package-lock\.json|npm-shrinkwrap\.json|pnpm-lock\.yaml)$")


def tracked(root: Path) -> list[str]:
    """What git keeps, as paths from ``root``; skips the test where there is no git checkout."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout, so what is tracked is unknown")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True, text=True)
    return [name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def texts(root: Path, names: Sequence[str]) -> dict[str, str]:
    """The text of each file that is text."""
    found = {name: (root / name).read_bytes() for name in names}
    return {name: data.decode("utf-8", "replace") for name, data in found.items() if b"\0" not in data[:4096]}


def clean_text(files: Mapping[str, str]) -> Iterator[str]:
    """No tracked file names one machine's paths or a package registry; none is a lock file."""
    for path, text in files.items():
        if LOCK_FILES.search(path):
            yield f"{path}:1: a lock file; versions are said in pyproject.toml"
        for pattern, what in FORBIDDEN_TEXT.items():
            for found in re.finditer(pattern, text):
                yield f"{path}:{text.count(chr(10), 0, found.start()) + 1}: {found.group()!r} is {what}"


MAX_README_LINES = 250


def tree_in(page: str) -> dict[str, str]:
    """The file tree of a page: path -> its words. Two spaces of indent a level, folders end in /."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.S | re.M)
    block = next((block for block in blocks if re.search("^tiny_llm/", block, re.M)), "")
    entries: dict[str, str] = {}
    folders: list[str] = []
    for line in filter(str.strip, block.splitlines()):
        indent, name, words = re.fullmatch(r"((?:  )*)(\S+)\s*(.*)", line).groups()  # type: ignore[union-attr]
        folders[len(indent) // 2 :] = [name]
        entries["".join(folders)] = words
    return entries


def folders_of(names: Sequence[str]) -> set[str]:
    """Every folder that has one of these files, however deep, ending in /."""
    return {f"{parent}/" for name in names for parent in map(str, Path(name).parents) if parent != "."}


def map_is_right(page: str, names: Sequence[str]) -> Iterator[str]:
    """MAP.md: each tracked entry at the top and each module of the package has its line; none is stale."""
    top = {name.split("/")[0] + ("/" if "/" in name else "") for name in names}
    ours = [n for n in names if n.startswith(("tiny_llm/", "book/course/"))]
    modules = {n for n in ours if n.endswith(".py") and "/__init__" not in n}
    yield from tree_is_right("MAP.md", page, top | modules, folders_of(names) | set(names))


def readme_is_right(page: str, names: Sequence[str]) -> Iterator[str]:
    """README.md is short; its tree has the folders at the top and those of the package, and no file."""
    lines = len(page.splitlines())
    if lines > MAX_README_LINES:
        yield f"README.md:1: {lines} lines; at most {MAX_README_LINES}. What is of files belongs in MAP.md"
    folders = folders_of(names)
    near = {f for f in folders if not f.startswith(".") and re.fullmatch(r"(tiny_llm/)?[^/]+/", f)}
    yield from tree_is_right("README.md", page, near, folders)


def tree_is_right(path: str, page: str, wanted: Set[str], there: Set[str]) -> Iterator[str]:
    """The tree of the page at ``path`` has each of ``wanted``, says what it is, and nothing not ``there``."""
    entries = tree_in(page)
    for missing in sorted(wanted - set(entries)):
        yield f"{path}:1: the file tree has no line for {missing}"
    for entry, words in entries.items():
        if entry not in there:
            yield f"{path}:1: the file tree lists {entry}, which is not there"
        elif not words:
            yield f"{path}:1: the file tree does not say what {entry} is"


def undeclared(imports: Set[str], dependencies: Sequence[str]) -> Iterator[str]:
    """What the package imports is what pyproject.toml asks for, no less and no more."""
    declared = {re.split(r"[^\w.-]", line)[0].lower().replace("-", "_") for line in dependencies}
    for name in sorted(imports - declared):
        yield f"pyproject.toml: tiny_llm imports {name}, which is no dependency"
    for name in sorted(declared - imports):
        yield f"pyproject.toml: nothing in tiny_llm imports {name}"


def third_party_imports(folder: Path) -> set[str]:
    """The top-level modules that ``folder`` imports and that are neither ours nor the standard library's."""
    nodes = [n for f in folder.rglob("*.py") for n in ast.walk(ast.parse(f.read_text(encoding="utf-8")))]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    ]
    found = {module.split(".")[0] for module in modules}
    return found - set(sys.stdlib_module_names) - {folder.name, "book"}


def test_dependencies_are_what_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    problems = list(undeclared(third_party_imports(ROOT / "tiny_llm"), project["dependencies"]))
    assert not problems, "\n" + "\n".join(problems)


def test_undeclared_sees_both_sides(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        "import json\nfrom .y import z\nimport mlx.core as mx\ndef f():\n  from a_b.c import d\n"
    )
    assert list(undeclared(third_party_imports(tmp_path), ["mlx[cpu]==1; os", "A-b>=2,<3"])) == []
    assert list(undeclared(third_party_imports(tmp_path), ["mlx", "numpy"])) == [
        "pyproject.toml: tiny_llm imports a_b, which is no dependency",
        "pyproject.toml: nothing in tiny_llm imports numpy",
    ]


def test_tracked_text_is_clean() -> None:
    problems = list(clean_text(texts(ROOT, tracked(ROOT))))
    assert not problems, "\n" + "\n".join(problems)


def test_native_files_are_short_too() -> None:
    native = {f for f in tracked(ROOT) if Path(f).suffix in {".cpp", ".h", ".cuh", ".metal"}}
    lines = {f: len((ROOT / f).read_text(encoding="utf-8").splitlines()) for f in native}
    assert lines and {f: n for f, n in lines.items() if n > 500} == {}


def test_map_has_a_line_for_every_file() -> None:
    problems = list(map_is_right((ROOT / "MAP.md").read_text(encoding="utf-8"), tracked(ROOT)))
    assert not problems, "\n" + "\n".join(problems)


def test_readme_is_short_and_shows_the_folders() -> None:
    problems = list(readme_is_right((ROOT / "README.md").read_text(encoding="utf-8"), tracked(ROOT)))
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("a.md", "see\n/wor" + "k/main", "a.md:2: '/wor" + "k/' is a path"),
        ("a.py", "x = '/hom" + "e/ann/x'", "a.py:1: '/hom" + "e/ann' is a path"),
        ("a.sh", "curl https://pyp" + "i.org/simple", "a.sh:1: 'pyp" + "i.org' is a package registry"),
        ("uv.lock", "", "uv.lock:1: a lock file"),
    ],
)
def test_clean_text_sees_what_is_planted(path: str, text: str, complaint: str) -> None:
    assert list(clean_text({"fine.md": "https://example.org/work/, /tmp/x, ~/work, block.locked"})) == []
    problems = list(clean_text({path: text}))
    assert len(problems) == 1 and problems[0].startswith(complaint), problems


def page_with(*tree: str) -> str:
    return "\n".join(["# Title", "```text", *tree, "```", ""])


def test_map_is_read_both_ways() -> None:
    names = ["MAP.md", "tiny_llm/__init__.py", "tiny_llm/data.py", "tiny_llm/ops/rope.py"]
    tree = ("MAP.md  this", "tiny_llm/  all", "  data.py  data", "  ops/  sums", "    rope.py  rope")
    good = page_with(*tree)
    assert list(map_is_right(good, names)) == []
    assert [*map_is_right(good, [*names, "LICENSE", "tiny_llm/kv/dense.py"])] == [
        "MAP.md:1: the file tree has no line for LICENSE",
        "MAP.md:1: the file tree has no line for tiny_llm/kv/dense.py",
    ]
    gone = [name for name in names if name != "tiny_llm/data.py"]
    assert [*map_is_right(good, gone)] == [
        "MAP.md:1: the file tree lists tiny_llm/data.py, which is not there"
    ]
    assert [*map_is_right(good.replace("this", ""), names)] == [
        "MAP.md:1: the file tree does not say what MAP.md is"
    ]


def test_readme_is_read_both_ways() -> None:
    names = ["README.md", ".ci/run", "tiny_llm/data.py", "tiny_llm/ops/rope.py", "tests/ops/test_rope.py"]
    good = page_with("tiny_llm/  all", "  ops/  sums", "tests/  tests")
    assert list(readme_is_right(good, names)) == []
    assert [*readme_is_right(good, [*names, "tiny_llm/kv/dense.py", "book/mkdocs.yml"])] == [
        "README.md:1: the file tree has no line for book/",
        "README.md:1: the file tree has no line for tiny_llm/kv/",
    ]
    with_file = page_with("tiny_llm/  all", "  ops/  sums", "    rope.py  rope", "tests/  tests")
    assert [*readme_is_right(with_file, names)] == [
        "README.md:1: the file tree lists tiny_llm/ops/rope.py, which is not there"
    ]
    (long,) = readme_is_right(good + "\n" * MAX_README_LINES, names)
    assert "at most 250" in long
