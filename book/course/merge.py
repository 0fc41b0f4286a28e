"""Owns the merge of two sources of one module: the reference's, and the definitions that a learner wrote.

Works on syntax trees by qualified name (``attention_ref``, ``DenseCache.attend``). Imports the standard
library alone: it runs before any module of the package.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Sequence
from types import CodeType

STUB = "TODO(course"
"""What the message of a stub's NotImplementedError begins with: real code may raise that error too."""

_SHIFT = 1_000_000  # added to a learner's line numbers, which tells their code from the reference's
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Yield every function and method with its qualified name."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")


def is_stub(node: ast.AST) -> bool:
    """Whether a definition still raises what ``course start`` wrote."""
    raised = (n.exc for n in ast.walk(node) if isinstance(n, ast.Raise))
    return any(exc is not None and f"'{STUB}" in ast.unparse(exc) for exc in raised)


def merged_code(
    reference: str, path: str, owns: Sequence[tuple[str, str]], without: Collection[str]
) -> CodeType:
    """Compile ``reference`` with the definitions of each of ``owns`` in their places, the last one's first.

    ``owns`` are texts with their paths; stubs and ``without`` are left out. A traceback shows each function
    where it was written. Raises SyntaxError as the compiler does.
    """
    tree = ast.parse(reference, path)
    for number, (own, own_path) in enumerate(owns, 1):
        learner = ast.parse(own, own_path)
        ast.increment_lineno(learner, number * _SHIFT)
        tree.body = _merged(tree.body, learner.body, without, "")
    return _placed(compile(tree, path, "exec"), [own_path for _, own_path in owns])


def _merged(
    reference: list[ast.stmt], own: list[ast.stmt], without: Collection[str], prefix: str
) -> list[ast.stmt]:
    """Own statements replace those of their name; a new one stands before the next that replaces."""
    result, new = list(reference), list[ast.stmt]()
    for node in own:
        name = _name(node)
        if _is_left_out(node, f"{prefix}{name}", without):
            continue
        there = next((old for old in result if name is not None and _name(old) == name), None)
        if there is None:
            new.append(node)
            continue
        if isinstance(node, ast.ClassDef) and isinstance(there, ast.ClassDef):
            there.body = _merged(there.body, node.body, without, f"{prefix}{name}.")
            node = there
        at = result.index(there)
        result[at : at + 1] = [*new, node]
        new.clear()
    return result + new


def _is_left_out(node: ast.stmt, name: str, without: Collection[str]) -> bool:
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
    stub = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_stub(node)
    return docstring or future or stub or name in without


def _name(node: ast.stmt) -> str | None:
    """What a statement defines: a function, a class, or one variable."""
    if isinstance(node, _DEFINITIONS):
        return node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else None


def _placed(code: CodeType, paths: Sequence[str]) -> CodeType:
    """Give code with shifted lines its own file and lines again; the line table counts from the first."""
    inner = tuple(_placed(c, paths) if isinstance(c, CodeType) else c for c in code.co_consts)
    number, first = divmod(code.co_firstlineno, _SHIFT)
    if not number:
        return code.replace(co_consts=inner)
    return code.replace(co_consts=inner, co_filename=paths[number - 1], co_firstlineno=first)
