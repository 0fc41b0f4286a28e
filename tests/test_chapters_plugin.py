"""pytest --chapter, tried on a small suite of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SUITE = """
import pytest

@pytest.mark.chapter("1.1")
def test_one():
    pass

@pytest.mark.chapter("1.3")
@pytest.mark.parametrize("n", [1, 2])
def test_three(n):
    pass

@pytest.mark.chapter("1.1")
@pytest.mark.chapter("1.3")
def test_both():
    pass

def test_none():
    pass
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder with our conftest and four tests of several chapters."""
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(SUITE)
    return pytester


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "names"),
    [
        ([], ["test_one", "test_three[1]", "test_three[2]", "test_both", "test_none"]),
        (["--chapter", "1.3"], ["test_three[1]", "test_three[2]", "test_both"]),
        (
            ["--chapter", "1.1", "--chapter", "1.3"],
            ["test_one", "test_three[1]", "test_three[2]", "test_both"],
        ),
        (["-m", 'chapter("1.1")'], ["test_one", "test_both"]),
        (["-m", 'chapter(id="1.1")'], ["test_one", "test_both"]),
        (["-m", "not chapter"], ["test_none"]),
        (["-m", "not chapter('1.3')", "--chapter", "1.1"], ["test_one"]),
    ],
)
def test_selection(suite: pytest.Pytester, args: list[str], names: list[str]) -> None:
    result = suite.runpytest("--strict-markers", "-p", "no:cacheprovider", "-v", *args)
    result.assert_outcomes(passed=len(names), deselected=5 - len(names))
    for name in names:
        result.stdout.fnmatch_lines([f"*::{name.replace('[', '[[]')} PASSED*"])


@pytest.mark.parametrize(
    ("chapter", "complaint"),
    [
        ("9.9", "*No test of chapter 9.9 here; there are: 1.1, 1.3.*"),
        ("one", "*--chapter is 'one', but*like 1.3.*"),
    ],
)
def test_unknown_chapter_is_an_error(suite: pytest.Pytester, chapter: str, complaint: str) -> None:
    result = suite.runpytest("--chapter", chapter)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([complaint])
