"""Owns definitions as text: cut from a source whole, as a stub or as a mutant, and put into a file.

Knows neither chapters nor where files lie.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO

from book.course.merge import STUB, Function, functions, is_stub
from tiny_llm.errors import ConfigError


def definitions(source: str) -> Mapping[str, bool]:
    """Each function's and method's qualified name, and whether it is still what ``course start`` wrote."""
    return {name: is_stub(node) for name, node in functions(ast.parse(source))}


def check(source: str, path: str) -> None:
    """Raises ConfigError if ``source`` is not Python."""
    try:
        ast.parse(source, path)
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}; mend it, then try again.") from error


def whole(source: str, name: str) -> str:
    """The text of a definition with its decorators. Raises ConfigError if there is none."""
    node = _found(source, name)
    return _lines(source, _first_line(node), node.end_lineno)


def stub(source: str, name: str, chapter: str) -> str:
    """Signature and docstring of a definition, and a body that says what is to be done."""
    node = _found(source, name)
    first = node.body[0]
    end = first.end_lineno if ast.get_docstring(node) is not None else first.lineno - 1
    indent = " " * first.col_offset
    body = f'{indent}raise NotImplementedError("{STUB} {chapter})")\n'
    return _lines(source, _first_line(node), end) + body


def heading(source: str, about: str) -> str:
    """How a learner's file begins: a docstring, and what lets annotations be names."""
    return f'"""{about}"""\n\nfrom __future__ import annotations\n'


def added(text: str, reference: str, name: str, definition: str) -> str:
    """Put ``definition`` into a learner's ``text``, at the end or into its class, with what it imports."""
    text = _with_imports(text, reference, name)
    *outer, _ = name.split(".")
    if not outer:
        return f"{text.rstrip()}\n\n\n{definition}"
    there = next((n for n in ast.parse(text).body if _is_class(n, outer[0])), None)
    if there is not None:
        lines = _in_lines(text)
        end = there.end_lineno or 0
        return "".join([*lines[:end], "\n", definition, *lines[end:]])
    node = next(n for n in ast.parse(reference).body if _is_class(n, outer[0]))
    assert isinstance(node, ast.ClassDef)
    top = _lines(reference, node.lineno, node.body[0].end_lineno)
    return f"{text.rstrip()}\n\n\n{top}\n{definition}"


def imports(source: str, name: str) -> Sequence[str]:
    """The import statements that a definition's names come from, with no name that it does not use."""
    used = {node.id for node in ast.walk(_found(source, name)) if isinstance(node, ast.Name)}
    statements = list[str]()
    for node in _imports(ast.parse(source)):
        node.names = [alias for alias in node.names if (alias.asname or alias.name.partition(".")[0]) in used]
        if node.names:
            statements.append(ast.unparse(node))
    return statements


def _imports(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If):  # what only type checkers import is imported: annotations are strings
            yield from (inner for inner in node.body if isinstance(inner, ast.Import | ast.ImportFrom))


def _with_imports(text: str, reference: str, name: str) -> str:
    """``text`` with those imports of a definition that it lacks, behind its own."""
    tree = ast.parse(text)
    own = list(_imports(tree))
    bound = {(alias.asname or alias.name) for node in own for alias in node.names}
    new = list[str]()
    for statement in imports(reference, name):
        (node,) = ast.parse(statement).body
        assert isinstance(node, ast.Import | ast.ImportFrom)
        node.names = [alias for alias in node.names if (alias.asname or alias.name) not in bound]
        new += [ast.unparse(node) + "\n"] if node.names else []
    at = max((node.end_lineno or 0 for node in own), default=0)
    lines = _in_lines(text)
    if new and len(own) == 1:
        new.insert(0, "\n")  # behind the line about annotations
    return "".join([*lines[:at], *new, *lines[at:]])


def parameters(source: str, name: str) -> Sequence[str]:
    """Names, kinds and defaults of a definition's parameters; annotations are the learner's affair."""
    bare = ast.parse(ast.unparse(_found(source, name))).body[0]
    assert isinstance(bare, ast.FunctionDef | ast.AsyncFunctionDef)
    for argument in ast.walk(bare.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return tuple(ast.unparse(bare.args).split(", "))


def _found(source: str, name: str) -> Function:
    node = dict(functions(ast.parse(source))).get(name)
    if node is None:
        raise ConfigError(f"There is no {name} in the reference any more; book/chapters names it.")
    return node


def _is_class(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.ClassDef) and node.name == name


def _first_line(node: Function) -> int:
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def _in_lines(source: str) -> list[str]:
    """The lines as the syntax tree counts them: str.splitlines would end one at a form feed or U+2028 too."""
    return list(StringIO(source))


def _lines(source: str, first: int, last: int | None) -> str:
    lines = _in_lines(source)[first - 1 : last]
    return "".join(lines).rstrip("\n") + "\n"
