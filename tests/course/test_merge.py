"""Two sources become one module: what replaces what, in which order, and where a traceback points."""

from __future__ import annotations

import ast
import traceback
from collections.abc import Collection
from typing import Any

import pytest

from book.course.excerpt import added, heading, whole
from book.course.merge import functions, is_stub, merged_code

REFERENCE = '''"""Reference."""
from __future__ import annotations
from dataclasses import dataclass
from enum import Enum

SIZE = 3

def double(x): return 2 * x

def use(x): return double(x) + SIZE

class Color(Enum):
    RED = 1
    BLUE = 2

@dataclass
class Point:
    x: int
    y: int = 0
    def norm(self): return abs(self.x)
    def far(self): return self.norm() > 10
'''


def merged(own: str, without: Collection[str] = ()) -> dict[str, Any]:
    """The names of the merged module."""
    names: dict[str, Any] = {"__name__": __name__}  # dataclasses look their module up
    exec(merged_code(REFERENCE, "reference.py", [(own, "own.py")], without), names)
    return names


def test_a_definition_replaces_and_the_rest_stays() -> None:
    names = merged("def double(x):\n    return 20 * x\n")
    assert names["use"](1) == 23, "the reference's use() calls the learner's double()"
    assert names["__doc__"] == "Reference."


def test_what_is_new_stands_before_what_needs_it() -> None:
    helper = "import math\nFACTOR = 5\ndef helper(x): return FACTOR * math.floor(x)\n"
    names = merged(helper + "def double(x, f=helper): return f(x)\n")
    assert names["use"](1) == 8
    assert merged("def late(): return SIZE\n")["late"]() == 3


def test_a_class_is_merged_member_by_member() -> None:
    point = merged("class Point:\n    y: int = 7\n    def norm(self): return self.x + self.y\n")["Point"]
    assert (point(4).norm(), point(4).far()) == (11, True)
    assert list(point.__dataclass_fields__) == ["x", "y"], "a field keeps its place"


def test_an_enum_keeps_its_members() -> None:
    color = merged("class Color:\n    RED = 9\n")["Color"]
    assert [(c.name, c.value) for c in color] == [("RED", 9), ("BLUE", 2)]


def test_stubs_and_what_is_left_out_are_the_references() -> None:
    stub = 'def double(x):\n    raise NotImplementedError("TODO(course 1.1)")\n'
    assert merged(stub)["use"](1) == 5
    real = 'def double(x):\n    raise NotImplementedError("no such thing")\n'
    with pytest.raises(NotImplementedError, match="no such thing"):
        merged(real)["use"](1)
    assert merged(real, without=["double"])["use"](1) == 5
    method = "class Point:\n    def norm(self): return 99\n"
    assert merged(method, without=["Point.norm"])["Point"](1).norm() == 1


def test_stubs_are_told_from_code() -> None:
    found = {name: is_stub(node) for name, node in functions(ast.parse(REFERENCE))}
    assert found == {"double": False, "use": False, "Point.norm": False, "Point.far": False}


def test_a_traceback_points_into_the_file_where_it_was_written() -> None:
    names = merged("\n\ndef double(x):\n    y = [x]\n    return max(z / 0 for z in y)\n")
    with pytest.raises(ZeroDivisionError) as caught:
        names["use"](1)
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(caught.tb)[1:]]
    assert frames == [("reference.py", 10), ("own.py", 5), ("own.py", 5)]


def test_a_mistake_in_the_syntax_is_reported_as_python_does() -> None:
    with pytest.raises(SyntaxError, match="expected") as caught:
        merged("def double(x)\n    return x\n")
    assert (caught.value.filename, caught.value.lineno) == ("own.py", 1)


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c", "\x1c"], ids=ascii)
def test_lines_are_counted_as_python_counts_them(mark: str) -> None:
    """Each of them ends a line for str.splitlines, and stands in a string here."""
    source = f'NAME = "{mark}"\n\ndef f():\n    return 1\n\nclass A:\n    pass\n\nX = 1\n'
    assert whole(source, "f") == "def f():\n    return 1\n"
    assert added(source, REFERENCE.replace("Point", "A"), "A.norm", "    def norm(self): ...\n").endswith(
        "class A:\n    pass\n\n    def norm(self): ...\n\nX = 1\n"
    )


def test_a_stub_brings_the_imports_that_its_definition_needs_and_no_others() -> None:
    source = "from __future__ import annotations\nimport os\nfrom math import pi, tau\n\n\n"
    source += "def f(x: Path): return pi * x\n\n\ndef g(x): return tau, pi, os.sep\n"
    mine = added(heading(source, "Mine."), source, "f", "def f(x): ...\n")
    assert mine.split("\n\n\n")[0].endswith("annotations\n\nfrom math import pi")
    mine = added(mine, source, "g", "def g(x): ...\n")
    assert mine.split("\n\n\n")[0].endswith("\n\nfrom math import pi\nimport os\nfrom math import tau")
    assert added(mine, source, "g", "").count("import") == mine.count("import")
