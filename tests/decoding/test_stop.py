"""An answer ends where it must, and never shows a character of what ended it."""

from __future__ import annotations

from copy import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_llm.decoding.stop import StopChecker, find_stop, open_length
from tiny_llm.sampling_params import SamplingParams

pytestmark = pytest.mark.chapter("1.6")

EOS = 99


class Pieces:
    """A detokenizer whose token i is the i-th piece; like a real one it may hold a piece back."""

    def __init__(self, pieces: list[str], hold: bool = False) -> None:
        self._pieces, self._held, self._hold = pieces, "", hold

    def push(self, token_id: int) -> str:
        text = self._held + self._pieces[token_id]
        self._held = text[-1:] if self._hold else ""
        return text[: len(text) - len(self._held)]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held

    def copy(self) -> Pieces:
        return copy(self)


def run(answer: StopChecker, tokens: list[int]) -> list[str]:
    shown = []
    for token in tokens:
        shown.append(answer.push(token))
        if answer.finish_reason:
            break
    return shown


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition, a character at a time: (text before the first complete stop, was there one)."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@pytest.mark.slow
@settings(max_examples=300)
@given(
    pieces=st.lists(st.text(alphabet="ab\nü", max_size=4), min_size=1, max_size=12),
    stops=st.lists(st.text(alphabet="ab\nü", min_size=1, max_size=5), max_size=3),
    hold=st.booleans(),
)
def test_streaming_equals_cutting_the_whole_text(pieces: list[str], stops: list[str], hold: bool) -> None:
    answer = StopChecker(
        Pieces(pieces, hold), SamplingParams(stop=tuple(stops), max_tokens=len(pieces)), {EOS}
    )
    shown = run(answer, list(range(len(pieces))))
    expected, stopped = cut_at_first_stop("".join(pieces), stops)
    assert "".join(shown) == answer.text == expected
    assert answer.finish_reason == ("stop" if stopped else "length")
    assert answer.num_tokens == len(shown)
    if stopped and not hold:
        used = len(shown)
        assert cut_at_first_stop("".join(pieces[:used]), stops)[1]
        assert not cut_at_first_stop("".join(pieces[: used - 1]), stops)[1], "went on past the stop string"


def test_stop_string_across_token_borders_is_never_shown() -> None:
    pieces = ["Hello\n", "US", "ER", ": more"]
    answer = StopChecker(Pieces(pieces), SamplingParams(stop=("\nUSER:",), max_tokens=10), {EOS})
    assert run(answer, [0, 1, 2, 3]) == ["Hello", "", "", ""]
    assert (answer.text, answer.finish_reason, answer.num_tokens) == ("Hello", "stop", 4)


def test_held_text_is_shown_once_it_cannot_be_a_stop_string() -> None:
    answer = StopChecker(Pieces(["a<", "/", "b>", "c"]), SamplingParams(stop=("</a>",), max_tokens=10), {EOS})
    assert run(answer, [0, 1, 2, 3]) == ["a", "", "</b>", "c"]


def test_held_text_is_shown_when_the_answer_ends_otherwise() -> None:
    by_length = StopChecker(Pieces(["one ST"]), SamplingParams(stop=("STOP",), max_tokens=1), {EOS})
    assert run(by_length, [0]) == ["one ST"] and by_length.finish_reason == "length"
    by_eos = StopChecker(Pieces(["one ST"]), SamplingParams(stop=("STOP",), max_tokens=9), {EOS})
    assert run(by_eos, [0, EOS]) == ["one ", "ST"] and by_eos.finish_reason == "stop"


def test_first_complete_stop_string_counts_and_the_longest_of_those() -> None:
    assert find_stop("xabcdef", ["abcdef", "cd"]) == 3, "cd is complete before abcdef"
    assert find_stop("xabcd", ["cd", "abcd"]) == 1, "both end together: the longest"
    assert find_stop("xyz", ["a"]) is None and find_stop("xyz", []) is None
    assert find_stop("a, then b", ["a"]) == 0, "the beginning is a place, too"
    assert find_stop("x##y##", ["##"]) == 1, "the first of two"
    assert find_stop("STOP", ["stop"]) is None, "a letter is itself"
    assert find_stop("xyz", ["a", "b", "c", "d", "e", "z"]) == 2, "however many there are"


def test_open_length_is_the_longest_beginning_at_the_end() -> None:
    assert open_length("aab", ["abc"]) == 2
    assert open_length("xaa", ["aaab", "ab"]) == 2
    assert open_length("abc", ["abc"]) == 0, "a complete one is not open"
    assert open_length("xab", ["#", "abc"]) == 2, "of any of them"
    assert open_length("xb", ["abc"]) == 0, "what stands inside of a stop string begins none"
    assert open_length("", ["abc"]) == open_length("abc", []) == 0


def test_end_token_is_counted_but_not_shown() -> None:
    answer = StopChecker(Pieces(["a", "b"]), SamplingParams(max_tokens=10), {EOS})
    assert run(answer, [0, 1, EOS]) == ["a", "b", ""]
    assert (answer.num_tokens, answer.finish_reason) == (3, "stop")


def test_ignore_eos_goes_on_but_a_stop_token_id_still_ends() -> None:
    pieces = ["a", "b", "c"]
    answer = StopChecker(
        Pieces(pieces), SamplingParams(ignore_eos=True, stop_token_ids=(2,), max_tokens=10), {1}
    )
    assert run(answer, [0, 1, 2]) == ["a", "b", ""]
    assert answer.finish_reason == "stop"


def test_limit_counts_tokens() -> None:
    answer = StopChecker(Pieces(["a", "", "b"]), SamplingParams(max_tokens=2), {EOS})
    assert run(answer, [0, 1, 2]) == ["a", ""]
    assert answer.finish_reason == "length"
    last = StopChecker(Pieces(["a"]), SamplingParams(max_tokens=2), {EOS})
    run(last, [0, EOS])
    assert last.finish_reason == "stop", "an end token at the limit is a stop"


def test_what_the_first_min_tokens_say_is_shown_whatever_it_is() -> None:
    """A stop string ends an answer only behind them: "no end before" it says."""
    params = SamplingParams(stop=("b",), min_tokens=3, max_tokens=10)
    answer = StopChecker(Pieces(["ab", "b", "xb", "cb"]), params, {EOS})
    assert run(answer, [0, 1, 2, 3]) == ["ab", "b", "xb", "c"]
    assert (answer.finish_reason, answer.num_tokens, answer.shown_tokens) == ("stop", 4, 4)


def test_a_stop_string_that_begins_in_them_is_none() -> None:
    params = SamplingParams(stop=("bc",), min_tokens=1, max_tokens=10)
    answer = StopChecker(Pieces(["ab", "c", "bc"]), params, {EOS})
    assert run(answer, [0, 1, 2]) == ["ab", "c", ""]
    assert (answer.text, answer.finish_reason) == ("abc", "stop")


@pytest.mark.slow
@settings(max_examples=300)
@given(
    pieces=st.lists(st.text(alphabet="ab", max_size=3), min_size=1, max_size=10),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=2),
    ends=st.booleans(),
)
def test_shown_tokens_are_those_whose_text_begins_in_the_text(
    pieces: list[str], stops: list[str], ends: bool
) -> None:
    """One whose text is empty counts with what is before it, as soon as that is shown."""
    answer = StopChecker(Pieces(pieces), SamplingParams(stop=tuple(stops), max_tokens=len(pieces) + 1), {EOS})
    text, before = "", 0
    for number, token in enumerate([*range(len(pieces)), *([EOS] * ends)]):
        text += answer.push(token)
        starts = [len("".join(pieces[:i])) for i in range(min(number + 1, len(pieces)))]
        begun = sum(start < len(text) for start in starts)
        at_most = sum(start <= len(text) for start in starts)
        assert max(begun, before) <= answer.shown_tokens <= at_most
        before = answer.shown_tokens
        if answer.finish_reason:
            break
