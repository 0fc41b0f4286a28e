"""Read, search and edit: what comes back, and edits that do not apply. And the calculator."""

from __future__ import annotations

from typing import Any

import pytest

from tiny_llm.agent.action import Actions, Outcome, Prepared
from tiny_llm.agent.calculator import calculate, calculator
from tiny_llm.agent.files import file_tools
from tiny_llm.agent.workspace import Workspace, digest_of
from tiny_llm.errors import RequestError


@pytest.fixture
def actions(workspace: Workspace) -> Actions:
    return Actions([*file_tools(workspace), calculator()])


def prepared(actions: Actions, name: str, **arguments: Any) -> Prepared:
    tool, given = actions.find({"name": name, "arguments": arguments})
    return tool.prepare(given)


def done(actions: Actions, name: str, **arguments: Any) -> Outcome:
    return prepared(actions, name, **arguments).perform()


def test_read_shows_a_range_and_how_much_there_is(workspace: Workspace, actions: Actions) -> None:
    (workspace.root / "a").write_text("\n".join(f"line {n}" for n in range(1, 101)))
    text = done(actions, "read", path="a", first=99, last=200).text
    assert text == "[lines 99 to 100 of 100]\nline 99\nline 100"


def test_search_finds_places_and_lists_files(workspace: Workspace, actions: Actions) -> None:
    (workspace.root / "src").mkdir()
    (workspace.root / "src" / "a.py").write_text("x\nport = 1\n")
    (workspace.root / "data").write_bytes(b"port \xff")
    (workspace.root / ".git").mkdir()
    (workspace.root / ".git" / "config").write_text("port")
    assert done(actions, "search", text="port").text == "src/a.py:2: port = 1"
    assert done(actions, "search", text="absent").text == "not found"
    assert done(actions, "search", text="").text.split("\n") == ["data", "src/a.py"]


def test_a_search_ends(workspace: Workspace, actions: Actions) -> None:
    (workspace.root / "a").write_text(("x" * 5000 + "\n") * 500)
    lines = done(actions, "search", text="x").text.split("\n")
    assert len(lines) == 101 and "more" in lines[-1] and max(map(len, lines)) < 320


def test_an_edit_is_a_diff_first(workspace: Workspace, actions: Actions) -> None:
    (workspace.root / "a").write_text("one\ntwo\nthree\n")
    change = prepared(actions, "edit", path="a", old="two", new="2")
    assert "-two\n+2" in change.preview
    assert workspace.read("a") == b"one\ntwo\nthree\n", "nothing is done yet"
    outcome = change.perform()
    assert workspace.read("a") == b"one\n2\nthree\n"
    assert change.before == digest_of(b"one\ntwo\nthree\n")
    assert outcome.after == change.after == workspace.digest("a")


@pytest.mark.parametrize(
    ("path", "old", "new", "why"),
    [
        ("a", "two", "2", "there 2 times"),
        ("a", "four", "4", "there 0 times"),
        ("a", "", "x", "there already"),
        ("a", "one", "one", "changes nothing"),
        ("b", "one", "1", "is not there"),
        ("bytes", "one", "1", "no UTF-8"),
    ],
)
def test_an_edit_must_apply(
    workspace: Workspace, actions: Actions, path: str, old: str, new: str, why: str
) -> None:
    (workspace.root / "a").write_text("one two two")
    (workspace.root / "bytes").write_bytes(b"one\xff")
    with pytest.raises(RequestError, match=why):
        prepared(actions, "edit", path=path, old=old, new=new)


def test_an_edit_makes_a_file(workspace: Workspace, actions: Actions) -> None:
    change = prepared(actions, "edit", path="new/a.py", old="", new="x = 1\n")
    assert (change.before, change.preview[-6:]) == ("", "+x = 1")
    change.perform()
    assert workspace.read("new/a.py") == b"x = 1\n"


def test_an_edit_waits_for_no_file_that_changed_after_it_was_shown(
    workspace: Workspace, actions: Actions
) -> None:
    (workspace.root / "a").write_text("one")
    change = prepared(actions, "edit", path="a", old="one", new="1")
    (workspace.root / "a").write_text("one and more")
    with pytest.raises(RequestError, match="changed meanwhile"):
        change.perform()
    assert workspace.read("a") == b"one and more"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 * 7", "84"),
        ("sum([1.5, 2, -3])", "0.5"),
        ("sum(1, 2)", "3"),
        ("max(1, 2) ** 10 // 3 % 100", "41"),
        ("round(10 / 3, 2)", "3.33"),
        (" -(2 + 3)", "-5"),
    ],
)
def test_the_calculator_computes(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').getcwd()",
        "(1).real",
        "x",
        "True + 1",
        "'a' * 99",
        "9 ** 9 ** 9",
        "2 ** 99999",
        "(-1) ** 0.5",
        "1 / 0",
        "1e308 * 10 ** 400",
        "sum()",
        "[1] * 9",
        "(" * 300,
        "1" * 5000,
        "",
    ],
)
def test_the_calculator_refuses(expression: str) -> None:
    with pytest.raises(RequestError, match="cannot be computed"):
        calculate(expression)


@pytest.mark.parametrize(
    ("action", "why"),
    [
        ({"name": "launch", "arguments": {}}, "no action 'launch'"),
        ({"name": "raed", "arguments": {}}, "Did you mean 'read'"),
        ({"name": None}, "no action None"),
        ({"name": "read", "arguments": []}, "must be an object"),
        ({"name": "read", "arguments": {"path": "a", "first": 1}}, "last: Field required"),
        ({"name": "read", "arguments": {"path": "a", "first": "1", "last": 2}}, "first: "),
        ({"name": "read", "arguments": {"path": "a", "first": 0, "last": 2}}, "first: "),
        ({"name": "read", "arguments": {"path": "a", "first": 1, "last": 2, "x": 1}}, "x: Extra"),
    ],
)
def test_an_action_that_is_none_is_told(actions: Actions, action: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        actions.find(action)
