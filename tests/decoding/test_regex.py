"""A pattern's way to a mask by hand: what is left behind a text, and so which tokens can come."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest

from tiny_llm.decoding.regex import (
    OneOf,
    Rest,
    Star,
    State,
    after,
    constraint_ref,
    mask_ref,
    opened,
    parsed,
    repeated,
)

pytestmark = pytest.mark.chapter("4.4")

A, B, C = (frozenset(letter) for letter in (b"a", b"b", b"c"))
WORDS = ["ab", "aab", "ba", "bab", "1.", "12", ".5", "yes", "no", "ye", "es", "é", "an", " a", ", "]
VOCABULARY = [*(bytes([byte]) for byte in range(256)), *(word.encode() for word in WORDS), b"", b""]
END, MARK = len(VOCABULARY) - 2, len(VOCABULARY) - 1

PATTERNS = [
    "",
    "a",
    "ab|c",
    "a*",
    "a+b?",
    "(ab|a)*c",
    "(a|b)*abb",
    "(a*)*b",
    "((a?)*b?)+c",
    "(|a)+b",
    "a(b|c(a|b)*)?a",
    "(ab)+",
    "[ab]+c|b",
    "(a|ab)(c|bc)",
]


@contextmanager
def soon() -> Iterator[None]:
    """What goes round in a circle is over after two seconds of this process."""

    def late(*_: object) -> None:
        raise TimeoutError("it does not come to an end")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, 2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def state_of(pattern: str, text: str = "") -> State:
    """What is left of a pattern behind a text."""
    return after(opened([parsed(pattern)]), text.encode())


def names(mask: bytes) -> set[bytes]:
    """The tokens that a mask allows."""
    return {VOCABULARY[token] or b"(end)" for token, allowed in enumerate(mask) if allowed}


def test_the_last_item_is_repeated() -> None:
    assert repeated((A, B), "*") == (A, Star((B,)))
    assert repeated((A, B), "+") == (A, B, Star((B,))), "once, and then any number of times"
    group = OneOf(((A, B), ()))
    assert repeated((group,), "*") == (Star((group,)),) and repeated((group,), "+") == (group, Star((group,)))
    assert opened([repeated((B,), "?")]) == {(B,), ()}, "perhaps"
    assert after(opened([repeated((A, B), "?")]), b"a") == {(B,), ()}, "only the last one"


def test_a_choice_is_taken_in_each_way() -> None:
    assert opened([(OneOf(((A, B), (C,))), A)]) == {(A, B, A), (C, A)}
    assert opened([(OneOf(((A,), ())), B)]) == {(A, B), (B,)}, "an option without items is passed by"
    assert opened([(OneOf(((OneOf(((A,), (B,))), C), ())),)]) == {(A, C), (B, C), ()}, "choices in choices"
    assert opened([(OneOf(()), A)]) == frozenset(), "without an option nothing is left"


def test_a_star_is_entered_and_passed_by() -> None:
    assert opened([(Star((A, B)), C)]) == {(A, B, Star((A, B)), C), (C,)}
    assert opened([(Star((A,)),)]) == {(A, Star((A,))), ()}, "a text may end there"
    assert opened([(Star((A,)), Star((B,)), C)]) == {
        (A, Star((A,)), Star((B,)), C),
        (B, Star((B,)), C),
        (C,),
    }


def test_it_opens_however_deep_that_lies() -> None:
    rest: Rest = (A,)
    for _ in range(20):
        rest = (OneOf((rest, (B,))),)
    assert opened([rest]) == {(A,), (B,)}
    twice = (Star((A,)), B)
    assert opened([twice, twice]) == opened([twice])


def test_what_begins_with_a_byte_stays_as_it_is() -> None:
    assert opened([(A, Star((B,))), ()]) == {(A, Star((B,))), ()} and opened([]) == frozenset()
    assert opened([(A,), (OneOf(((B,), (A,))),)]) == {(A,), (B,)}, "all of them, each once"


def test_a_star_of_what_may_be_nothing_comes_to_an_end() -> None:
    with soon():
        inner = Star((A,))
        assert opened([(Star((inner,)), B)]) == {(A, inner, Star((inner,)), B), (B,)}
        perhaps = OneOf(((A,), ()))
        assert opened([(Star((perhaps,)),)]) == {(A, Star((perhaps,))), ()}


def test_each_byte_leaves_what_comes_behind_it() -> None:
    start = opened([(A, B), (A, C), (B, A)])
    assert after(start, b"") == start and after(start, b"a") == {(B,), (C,)}
    assert after(start, b"ab") == {()} and after(start, b"c") == frozenset()
    assert after(start, b"aba") == frozenset(), "nothing comes behind the end"
    assert after(opened([(frozenset(b"xyz"), Star((A,)))]), b"y") == {(A, Star((A,))), ()}, "opened, too"
    assert after(frozenset(), b"a") == after(frozenset(), b"") == frozenset()


def test_a_text_that_cannot_come_is_not_read_on() -> None:
    class Told(bytes):
        read = 0

        def __iter__(self) -> Iterator[int]:
            for byte in super().__iter__():
                self.read += 1
                yield byte

    text = Told(b"ac" + b"a" * 100)
    assert after(opened([(A, B)]), text) == frozenset() and text.read <= 3


def test_a_state_is_not_changed() -> None:
    start = opened([parsed("(a|b)*abb")])
    kept = frozenset(start)
    mask_ref(start, VOCABULARY, [END])
    assert start == kept and isinstance(after(start, b"ab"), frozenset), "it names a mask that is kept"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_pythons_matches(pattern: str) -> None:
    with soon():
        for length in range(5):
            for letters in product("abc", repeat=length):
                text = "".join(letters)
                left = state_of(pattern, text)
                assert (() in left) == (re.fullmatch(pattern, text) is not None), text
                if length < 3:
                    longer = {end for n in range(4) for end in product("abc", repeat=n)}
                    goes_on = any(re.fullmatch(pattern, text + "".join(end)) for end in longer)
                    assert bool(left) == goes_on, f"whether anything can come behind {text!r}"


@pytest.mark.parametrize(
    ("pattern", "text", "tokens"),
    [
        ("(ab|b)*", "", {b"a", b"b", b"ab", b"ba", b"bab", b"(end)"}),
        ("(ab|b)*", "a", {b"b", b"ba", b"bab"}),
        ("yes|no", "", {b"y", b"ye", b"yes", b"n", b"no"}),
        ("yes|no", "ye", {b"s"}),
        ("yes|no", "no", {b"(end)"}),
        (r"[0-9]+\.[0-9]?", "1", {*(b"%d" % n for n in range(10)), b".", b".5", b"12", b"1."}),
        ("é|è", "", {"é".encode(), b"\xc3"}),
        ("a*", "a", {b"a", b"(end)"}),
        ("A|[BC]a", "", {b"A", b"B", b"C"}),
    ],
)
def test_what_can_come_next_is_allowed(pattern: str, text: str, tokens: set[bytes]) -> None:
    assert names(mask_ref(state_of(pattern, text), VOCABULARY, [END])) == tokens


def test_a_mask_has_a_byte_a_token() -> None:
    mask = mask_ref(state_of("a*"), VOCABULARY, [END])
    assert isinstance(mask, bytes) and len(mask) == len(VOCABULARY) and set(mask) == {0, 255}
    assert mask[MARK] == 0, "a token without bytes would bring the text no further"
    assert not any(mask_ref(frozenset(), VOCABULARY, [END])), "nothing is left, not even the end"


def test_tokens_that_spell_the_same_are_alike() -> None:
    assert mask_ref(state_of("ab|c"), [b"a", b"b", b"a", b"c", b"a"], []) == bytes([255, 0, 255, 255, 255])


def test_the_end_is_allowed_where_the_text_may_end() -> None:
    ends = [b"a", b"", b"b", b"ab"]
    assert mask_ref(state_of("a?"), ends, [1, 2]) == bytes([255, 255, 255, 0]), (
        "any of several, whatever it spells"
    )
    assert mask_ref(state_of("ab?"), ends, [1, 2]) == bytes([255, 0, 0, 255])
    assert mask_ref(state_of("ab?", "a"), ends, [1]) == bytes([0, 255, 255, 0]), "and what goes on, as well"
    assert mask_ref(state_of("ab"), [b"a", b"a"], [1]) == bytes([255, 0]), "its own text is none"
    assert mask_ref(state_of("a?"), tuple(ends), frozenset([1])) == bytes([255, 255, 0, 0]), "a set of one"
    assert mask_ref(state_of("a?"), ends, []) == bytes([255, 0, 0, 0])


def test_a_mask_is_made_once_a_state() -> None:
    place, other = (constraint_ref("a(b|c)*", VOCABULARY, [END])() for _ in range(2))
    first = place([97])
    assert first == other([97]) and place([97, 98]) is place([97, 99, 98]), "the same is left"
    assert place([97]) is not place([])


@pytest.mark.parametrize(
    "pattern", ["a**", "+", "a|*", "(?", ")", "(a", "[^a]", "a.", "^a", r"\d", r"[\w]", "a{2}", "[a", "[b-a]"]
)
def test_what_is_not_known_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError):
        parsed(pattern)
