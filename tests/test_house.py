"""The house's rules, kept by reading the source: floors, circles, sizes, docstrings, what is forbidden.

A rule takes files and yields "path:line: what is wrong"; it knows nothing of what the code does.
Each rule is itself tried on a planted bad file, so a rule that stopped looking would be seen.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS: Sequence[frozenset[str]] = (
    # _cpu: the module that kernels/cpu becomes
    frozenset(
        {"data", "sampling_params", "config", "families", "config_fields", "config_rope", "errors", "metrics"}
        | {"config_embedding", "limits", "memory", "memory_limits", "version", "user_cache", "_cpu"}
    ),
    frozenset({"metalsim", "distributed", "tokenizer", "weights"}),
    frozenset({"ops"}),
    frozenset({"layers", "kv", "sampling"}),
    frozenset({"models", "decoding", "scheduler", "proving"}),
    frozenset({"messages", "options"}),
    frozenset({"engine"}),
    frozenset({"chat", "server", "agent", "planning"}),
    frozenset({"commands"}),
    # book/course, which uses the package and is not part of it
    frozenset({"book"}),
    frozenset({"cli"}),
    # tiny_llm/__init__.py and __main__.py: the doors, opened from outside only
    frozenset({"tiny_llm", "__main__"}),
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60
READ_ONLY_TYPES = {"Final", "Mapping", "Sequence", "Collection", "Iterable", "Set", "TypeAlias"}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_MAKERS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "OrderedDict", "Counter"}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "__import__"}
UNSAFE_FLAGS = {"allow_pickle", "trust_remote_code"}


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the root, with slashes, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        """The dotted name by which the file is imported."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def packaged(self) -> bool:
        """Whether the file is of the package or the course's commands, and not a tool or a test."""
        return self.path.startswith(("tiny_llm/", "book/course/"))


Rule = Callable[[Sequence[Source]], Iterator[str]]


def read_sources(root: Path) -> list[Source]:
    """Every Python file of main.py, tiny_llm, tools, tests, benchmarks, clients and book under ``root``."""
    files = [root / "main.py"]
    for folder in ("tiny_llm", "tools", "tests", "benchmarks", "clients", "book"):
        files += sorted((root / folder).rglob("*.py"))
    return [
        Source(f.relative_to(root).as_posix(), f.read_text(encoding="utf-8")) for f in files if f.is_file()
    ]


def imported(source: Source) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Each import's line, its module as an absolute name, and the names taken from it."""
    package = source.module if source.path.endswith("__init__.py") else source.module.rpartition(".")[0]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield (
                node.lineno,
                ".".join([*above, *filter(None, [node.module])]),
                tuple(a.name for a in node.names),
            )


def floor_of(name: str) -> int | None:
    """The floor of a folder or file directly in tiny_llm; None if the house has no such room."""
    return next((level for level, rooms in enumerate(FLOORS) if name in rooms), None)


def room_of(module: str) -> str:
    """The folder or file directly in tiny_llm that a module lies in; the course's is ``book``."""
    top, *inner = module.split(".")
    return inner[0] if inner and top == "tiny_llm" else top


def own_modules(source: Source, known: Mapping[str, Source]) -> Iterator[tuple[int, str]]:
    """The line and full name of each of our modules that ``source`` imports."""
    for line, module, names in imported(source):
        if module.split(".")[0] in ("tiny_llm", "book"):
            inner = [f"{module}.{name}" for name in names if f"{module}.{name}" in known]
            for target in inner or [module]:
                yield line, target


def floors(sources: Sequence[Source]) -> Iterator[str]:
    """Import from lower floors and from one's own folder; floor 0's files may use each other."""
    known = {source.module: source for source in sources}
    for source in filter(lambda s: s.packaged, sources):
        room = room_of(source.module)
        floor = floor_of(room)
        if floor is None:
            yield f"{source.path}:1: tiny_llm/{room} is on no floor; add it to FLOORS and to the design"
            continue
        for line, target in own_modules(source, known):
            other = room_of(target)
            level = floor_of(other)
            if other != room and (level is None or level > floor or level == floor > 0):
                way = "sideways" if level == floor else "up" if level else "outside the house"
                yield f"{source.path}:{line}: {room} (floor {floor}) imports {target}: {way}, not down"


def imports_at_the_top(sources: Sequence[Source]) -> Iterator[str]:
    """No import inside a function, except where the command line picks its command."""
    for source in sources:
        if source.path in ("main.py", "tiny_llm/cli.py"):
            continue
        functions = [node for node in ast.walk(source.tree) if isinstance(node, FUNCTION)]
        inside = {node for function in functions for node in ast.walk(function)}
        for node in inside:
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield f"{source.path}:{node.lineno}: import inside a function; move it to the top"


def circles(sources: Sequence[Source]) -> Iterator[str]:
    """No chain of imports that comes back to where it began."""
    known = {source.module: source for source in sources if source.packaged}
    graph = {name: [t for _, t in own_modules(s, known) if t in known] for name, s in known.items()}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> Iterator[str]:
        if name in trail:
            ring = [*trail[trail.index(name) :], name]
            yield f"{known[name].path}:1: import circle {' -> '.join(ring)}"
        elif name not in done:
            for target in graph[name]:
                yield from walk(target, (*trail, name))
            done.add(name)

    for name in graph:
        yield from walk(name, ())


def sizes(sources: Sequence[Source]) -> Iterator[str]:
    """Files and functions stay small enough to read."""
    for source in sources:
        lines = source.text.count("\n")
        if lines > MAX_FILE_LINES:
            yield f"{source.path}:1: {lines} lines; at most {MAX_FILE_LINES}"
        for node in ast.walk(source.tree):
            if isinstance(node, FUNCTION):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    where = f"{source.path}:{node.lineno}: {node.name}"
                    yield f"{where} has {length} lines; at most {MAX_FUNCTION_LINES}"


def docstrings(sources: Sequence[Source]) -> Iterator[str]:
    """Every module, public class, public function and public method says what it is."""

    def missing(path: str, body: Sequence[ast.stmt]) -> Iterator[str]:
        for node in body:
            if not isinstance(node, (ast.ClassDef, *FUNCTION)):
                continue
            said_elsewhere = re.search(r"overload|\.setter", " ".join(map(ast.unparse, node.decorator_list)))
            if node.name.startswith("_") or said_elsewhere:
                continue
            if not ast.get_docstring(node):
                yield f"{path}:{node.lineno}: {node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                yield from missing(path, node.body)

    for source in filter(lambda s: s.packaged, sources):
        if not ast.get_docstring(source.tree):
            yield f"{source.path}:1: the module has no docstring"
        yield from missing(source.path, source.tree.body)


def vague_names(sources: Sequence[Source]) -> Iterator[str]:
    """No room for things that belong nowhere."""
    for source in sources:
        vague = {"utils", "util", "core", "helpers", "misc"} & set(source.module.split("."))
        if vague:
            yield f"{source.path}:1: '{vague.pop()}' says nothing; name the file after what it owns"


def class_names(sources: Sequence[Source]) -> Iterator[str]:
    """A class's name says which one is meant, wherever it is read."""
    first: dict[str, str] = {}
    for source in filter(lambda s: s.packaged, sources):
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef) and first.setdefault(node.name, source.path) != source.path:
                yield f"{source.path}:{node.lineno}: {first[node.name]} has a class {node.name}, too"


def names_are_there(sources: Sequence[Source]) -> Iterator[str]:
    """What is imported of ours is defined there: mypy does not see scripts, and they run seldom."""
    there = {
        source.module: {name for node in ast.walk(source.tree) for name in defined(node)}
        for source in sources
        if source.packaged
    }
    for source in sources:
        for line, module, names in imported(source):
            for name in names if module in there else ():
                if name not in there[module] and f"{module}.{name}" not in there:
                    yield f"{source.path}:{line}: {module} has no {name}"


def defined(node: ast.AST) -> Iterator[str]:
    """The names that a node gives to a module."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)


def own_layers(sources: Sequence[Source]) -> Iterator[str]:
    """mlx.core's array operations only: the layers are what we teach."""
    for source in filter(lambda s: s.packaged, sources):
        for line, module, names in imported(source):
            if f"{module}.".startswith("mlx.nn.") or (module == "mlx" and "nn" in names):
                yield f"{source.path}:{line}: mlx.nn is not used here; build it from mlx.core"


def safe_loading(sources: Sequence[Source]) -> Iterator[str]:
    """Nothing that comes with a checkpoint is ever run."""
    for source in filter(lambda s: s.packaged, sources):
        for line, module, _ in imported(source):
            if module.split(".")[0] in UNSAFE_MODULES:
                yield f"{source.path}:{line}: {module} can run what it loads"
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
                yield f"{source.path}:{node.lineno}: {ast.unparse(node)} can run what it is given"
            if isinstance(node, ast.keyword) and node.arg in UNSAFE_FLAGS:
                yield f"{source.path}:{node.lineno}: {node.arg} can run what it loads"


def quiet_import(sources: Sequence[Source]) -> Iterator[str]:
    """Importing a module does no work and leaves nothing that could change later."""

    for source in filter(lambda s: s.packaged, sources):
        for node in source.tree.body:
            where = f"{source.path}:{node.lineno}:"
            value = node.value if isinstance(node, ast.Expr | ast.Assign | ast.AnnAssign) else None
            called = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
            optional = isinstance(node, ast.With) and all(isinstance(n, ast.Import) for n in node.body)
            loop = isinstance(node, ast.For | ast.While | ast.With) and not optional
            if loop or (isinstance(node, ast.Expr) and called):
                yield f"{where} work at import; put it in a function"
            elif re.match(r"(mx|mlx\.core)\.", called):
                yield f"{where} an array made at import; make it where it is used"
            kind = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
            read_only = kind.split("[")[0].rpartition(".")[2] in READ_ONLY_TYPES
            mutable = isinstance(value, MUTABLE) or called.rpartition(".")[2] in MUTABLE_MAKERS
            if mutable and not read_only and not ast.unparse(node).startswith("__all__ "):
                yield f"{where} mutable at module level; make it a tuple, or annotate it as a Mapping"
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Global):
                yield f"{source.path}:{node.lineno}: global; give the value an owner"


def json_lines(sources: Sequence[Source]) -> Iterator[str]:
    """JSON lines end at newlines: str.splitlines cuts at U+2028 and U+0085 too, which texts may have."""
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.For | ast.ListComp | ast.GeneratorExp):
                written = ast.unparse(node)
                if ".splitlines(" in written and re.search(r"\b(loads|from_json)\(", written):
                    yield f"{source.path}:{node.lineno}: splitlines before JSON; use split"


RULES: Sequence[Rule] = (
    floors,
    imports_at_the_top,
    circles,
    sizes,
    docstrings,
    vague_names,
    class_names,
    names_are_there,
    own_layers,
    safe_loading,
    quiet_import,
    json_lines,
)


@pytest.fixture(scope="module")
def house() -> list[Source]:
    """Our own files, read and parsed once."""
    return read_sources(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule, house: Sequence[Source]) -> None:
    problems = list(rule(house))
    assert not problems, f"{rule.__doc__}\n" + "\n".join(problems)


GOOD = {
    "tiny_llm/__init__.py": '"""Door."""\nfrom tiny_llm.engine.llm import LLM\n__all__ = ["LLM"]\n',
    "tiny_llm/data.py": '"""Data."""\nfrom tiny_llm.errors import Oops\n',
    "tiny_llm/errors.py": '"""Errors."""\nclass Oops(Exception):\n  """Oops."""\n  def __str__(self): ...\n',
    "tiny_llm/ops/rope.py": '"""Rope."""\nimport typing\nT: typing.Mapping[str, int] = {"a": 1}\n',
    "tiny_llm/ops/attention.py": '"""Attention."""\nfrom tiny_llm.ops import rope\ndef _hidden(): ...\n',
    "tiny_llm/chat.py": '"""Chat."""\nwith suppress(ImportError):\n  import readline\n',
    "tiny_llm/engine/llm.py": '"""LLM."""\nfrom ..ops.rope import T\nclass LLM:\n    """LLM."""\n',
    "tiny_llm/cli.py": '"""CLI."""\ndef main():\n    """Run."""\n    from tiny_llm.engine import llm\n',
    "book/course/check.py": '"""Check."""\nfrom tiny_llm.engine import llm\nfrom book.course import merge\n',
    "main.py": "def main():\n    import json\n",
}
BODY = '"""Says what it owns."""\n'
PLANTED: Sequence[tuple[Rule, str, str, str]] = (
    (floors, "tiny_llm/ops/x.py", BODY + "from tiny_llm.engine import llm", "x.py:2: ops (floor 2) imports"),
    (floors, "tiny_llm/ops/x.py", BODY + "from ..engine.llm import LLM", "imports tiny_llm.engine.llm: up"),
    (floors, "tiny_llm/ops/x.py", BODY + "import tiny_llm", "imports tiny_llm: up"),
    (floors, "tiny_llm/kv/x.py", BODY + "import tiny_llm.layers.y", "imports tiny_llm.layers.y: sideways"),
    (floors, "tiny_llm/kv/x.py", BODY + "from tiny_llm import nowhere", "imports tiny_llm: up"),
    (floors, "tiny_llm/kv/x.py", BODY + "from tiny_llm.cellar import z", "outside the house"),
    (
        floors,
        "tiny_llm/errors.py",
        BODY + "def f():\n  from tiny_llm.ops import rope",
        "errors (floor 0) imports",
    ),
    (floors, "tiny_llm/kv/x.py", BODY + "from book.course import check", "imports book.course.check: up"),
    (
        floors,
        "book/course/x.py",
        BODY + "from tiny_llm.cli import main",
        "book (floor 9) imports tiny_llm.cli",
    ),
    (floors, "tiny_llm/attic/x.py", BODY, "tiny_llm/attic is on no floor"),
    (floors, "tiny_llm/demo/x.py", BODY, "tiny_llm/demo is on no floor"),
    (
        imports_at_the_top,
        "tiny_llm/ops/x.py",
        BODY + "def f():\n  def g():\n    import json",
        "x.py:4: import inside",
    ),
    (
        imports_at_the_top,
        "tools/x.py",
        "class A:\n  async def f():\n    from json import loads",
        "x.py:3: import inside",
    ),
    (
        circles,
        "tiny_llm/ops/rope.py",
        BODY + "from tiny_llm.ops import attention",
        "tiny_llm.ops.rope -> tiny_llm.ops.att",
    ),
    (
        circles,
        "tiny_llm/errors.py",
        BODY + "import tiny_llm.data",
        "tiny_llm.data -> tiny_llm.errors -> tiny_llm.data",
    ),
    (sizes, "tests/x.py", "x = 1\n" * 501, "x.py:1: 501 lines; at most 500"),
    (sizes, "benchmarks/x.py", "def long():\n" + "    x = 1\n" * 60, "x.py:1: long has 61 lines; at most 60"),
    (docstrings, "tiny_llm/ops/x.py", "x = 1", "x.py:1: the module has no docstring"),
    (docstrings, "book/course/x.py", "x = 1", "x.py:1: the module has no docstring"),
    (docstrings, "tiny_llm/ops/x.py", BODY + "def rope(): ...", "x.py:2: rope has no docstring"),
    (
        docstrings,
        "tiny_llm/ops/x.py",
        BODY + "class A:\n  'A.'\n  def b(self): ...",
        "x.py:4: b has no docstring",
    ),
    (vague_names, "tiny_llm/ops/utils.py", BODY, "'utils' says nothing"),
    (vague_names, "tools/core/x.py", BODY, "'core' says nothing"),
    (names_are_there, "book/x.py", "from tiny_llm.data import Bach", "tiny_llm.data has no Bach"),
    (class_names, "tiny_llm/ops/x.py", BODY + "class LLM:\n  'L.'", "tiny_llm/engine/llm.py has a class LLM"),
    (own_layers, "tiny_llm/ops/x.py", BODY + "from mlx import nn", "x.py:2: mlx.nn"),
    (own_layers, "tiny_llm/ops/x.py", BODY + "from mlx.nn.layers import Linear", "x.py:2: mlx.nn"),
    (safe_loading, "tiny_llm/ops/x.py", BODY + "import pickle", "pickle can run what it loads"),
    (safe_loading, "tiny_llm/ops/x.py", BODY + "x = exec('1')", "exec('1') can run what it is given"),
    (safe_loading, "tiny_llm/ops/x.py", BODY + "f(trust_remote_code=True)", "trust_remote_code can run"),
    (quiet_import, "tiny_llm/ops/x.py", BODY + "import mlx.core as mx\nmx.eval()", "x.py:3: work at import"),
    (quiet_import, "tiny_llm/ops/x.py", BODY + "for i in (1, 2):\n  pass", "x.py:2: work at import"),
    (quiet_import, "tiny_llm/ops/x.py", BODY + "X = mx.zeros(3)", "x.py:2: an array made at import"),
    (quiet_import, "tiny_llm/ops/x.py", BODY + "CACHE = {}", "x.py:2: mutable at module level"),
    (quiet_import, "tiny_llm/ops/x.py", BODY + "SEEN: set[str] = set()", "x.py:2: mutable at module level"),
    (quiet_import, "tiny_llm/ops/x.py", BODY + "N = 0\ndef f():\n  global N", "x.py:4: global"),
    (json_lines, "tools/x.py", "[json.loads(line) for line in text.splitlines()]", "x.py:1: splitlines"),
)


def plant(root: Path, files: Mapping[str, str]) -> list[Source]:
    """Write ``files`` under ``root`` and read them back as the house's."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return read_sources(root)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_a_good_house(rule: Rule, tmp_path: Path) -> None:
    assert list(rule(plant(tmp_path, GOOD))) == []


@pytest.mark.parametrize(
    ("rule", "path", "text", "complaint"), PLANTED, ids=[row[0].__name__ for row in PLANTED]
)
def test_rule_sees_what_is_planted(rule: Rule, path: str, text: str, complaint: str, tmp_path: Path) -> None:
    problems = list(rule(plant(tmp_path, {**GOOD, path: text})))
    assert len(problems) == 1, problems
    assert complaint in problems[0]
