"""A page names all that its tasks need: the reference's definitions use nothing that it does not show."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator

import pytest

from book.course.excerpt import imports
from book.course.manifest import ROOT, Chapter, read_manifest
from book.course.merge import Function, functions
from book.course.workbook import in_parts, is_native, reference

TASKS = [
    pytest.param(it, *in_parts(definition), id=f"{it.id}-{in_parts(definition)[1]}")
    for it in read_manifest().values()
    for definition in it.teaches
    if not is_native(in_parts(definition)[0])
]

USUAL = {"shape", "astype", "transpose", "reshape", "dtype", "open", *dir(str)}
"""What arrays, paths and texts have."""


def body_of(source: str, name: str) -> tuple[Function, list[ast.AST]]:
    """A definition, and every node of its body: annotations of its signature are in the stub."""
    node = dict(functions(ast.parse(source)))[name]
    inside = [inner for statement in node.body for inner in ast.walk(statement)]
    types = [inner.annotation for inner in inside if isinstance(inner, ast.AnnAssign)]
    return node, [inner for inner in inside if inner not in [n for one in types for n in ast.walk(one)]]


def parameters(node: Function) -> set[str]:
    """The names of a definition's parameters."""
    return {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}


def from_elsewhere(source: str, name: str) -> set[str]:
    """Names that a definition takes from Python's library and MLX, which have pages of their own."""
    lines = [line for line in imports(source, name) if not re.match(r"(from|import) tiny_llm", line)]
    aliases = [alias for line in lines for node in ast.parse(line).body for alias in node.names]  # type: ignore[attr-defined]
    return {alias.asname or alias.name.partition(".")[0] for alias in aliases}


def needs(source: str, name: str) -> Iterator[str]:
    """What a page must hold: ``helper(``, ``keyword=``, constants, fields of ``self`` and what is given."""
    node, inside = body_of(source, name)
    given, known = parameters(node), from_elsewhere(source, name) | set(dir(builtins))
    own = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {n.arg for n in inside if isinstance(n, ast.arg)} | given
    called = {n.func.id for n in inside if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    for n in inside:
        if isinstance(n, ast.Name) and n.id not in own | known:
            yield f"{n.id}(" if n.id in called else n.id
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in given - {"cls"}:
            yield from [f"self.{n.attr}" if n.value.id == "self" else n.attr] * (n.attr not in USUAL)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id not in own | known:
            yield from (f"{keyword.arg}=" for keyword in n.keywords if keyword.arg)


@pytest.mark.parametrize(("it", "module", "name"), TASKS)
def test_what_a_task_needs_is_on_its_page(it: Chapter, module: str, name: str) -> None:
    page = (ROOT / "book" / "docs" / it.page).read_text(encoding="utf-8")
    missing = [
        need
        for need in dict.fromkeys(needs(reference(module), name))
        if not re.search(rf"(?<![\w.]){re.escape(need)}" + ("" if need[-1] in "(=" else r"\b"), page)
        and not (need.isidentifier() and re.search(rf"\b{need}\b", page))
    ]
    assert not missing, f"chapter {it.id} does not show {missing}, which {name} uses"
