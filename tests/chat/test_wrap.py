"""Lines are broken between words, whatever the pieces that a text comes in."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_llm.chat.terminal import Wrapper, width

TEXTS = st.text(st.sampled_from("ab \n\tü漢字😀|`~-\u0301"), max_size=120)


def wrapped(pieces: list[str], columns: int) -> str:
    wrapper = Wrapper(lambda: columns)
    return "".join(map(wrapper.feed, pieces)) + wrapper.end()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two three", "one two\nthree"),
        ("one two\nthree", "one two\nthree"),
        ("one  two   three four", "one  two\nthree four"),
        ("exactly10! more", "exactly10!\nmore"),
        ("a https://example.org/long b", "a\nhttps://example.org/long b"),
        ("```\none two three\n```\none two three", "```\none two three\n```\none two\nthree"),
        ("| one | two | three |", "| one | two | three |"),
        ("你好世界你好世界", "你好世界你\n好世界"),
        ("\x1b[31mred\x07\r\n", "␛[31mred␇\n"),
    ],
)
def test_lines_of_ten_columns(text: str, shown: str) -> None:
    assert wrapped([text], 10) == shown
    assert wrapped(list(text), 10) == shown, "letter by letter"


@given(TEXTS, st.integers(1, 30), st.lists(st.integers(0, 120), max_size=5))
def test_pieces_make_no_difference_and_no_word_is_cut(text: str, columns: int, cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(ends)]
    shown = wrapped(pieces, columns)
    assert shown == wrapped([text], columns)
    assert "".join(shown.split()) == "".join(text.split()), "only blanks differ"
    words = {word for word in text.split() if word.isalpha() and width(word) == len(word)}
    assert words <= set(shown.split()), "a word of letters is whole"


@given(st.text(st.sampled_from("abc  \n"), max_size=200), st.integers(1, 30))
def test_no_row_of_words_that_fit_is_too_wide(text: str, columns: int) -> None:
    for row in wrapped([text], columns).split("\n"):
        longest = max(map(len, row.split()), default=0)
        assert len(row) <= columns or longest >= columns, repr(row)


def test_a_new_answer_begins_outside_of_code() -> None:
    wrapper = Wrapper(lambda: 10)
    assert wrapper.feed("```\ncode that was cut") + wrapper.end() == "```\ncode that was cut"
    assert wrapper.feed("one two three") + wrapper.end() == "one two\nthree"
