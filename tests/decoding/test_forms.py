"""An answer's place in a form, as the library keeps it: its masks are those that are made by hand."""

from __future__ import annotations

import random
from copy import copy
from functools import cache
from typing import Any, cast

import pytest
from llguidance import LLMatcher

from tiny_llm.decoding.grammar import lark_grammar, regex_grammar
from tiny_llm.decoding.regex import constraint_ref
from tiny_llm.decoding.structured_output import GrammarCompiler, GrammarConstraint
from tiny_llm.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.chapter("4.4")

WORDS = ["ab", "aab", "ba", "bab", "1.", "12", ".5", "yes", "no", "ye", "es", "é", "an", " a", ", "]
VOCABULARY = [*(bytes([byte]) for byte in range(256)), *(word.encode() for word in WORDS), b"", b""]
END, MARK = len(VOCABULARY) - 2, len(VOCABULARY) - 1


def names(mask: bytes) -> set[bytes]:
    """The tokens that a mask allows."""
    return {VOCABULARY[token] or b"(end)" for token, allowed in enumerate(mask) if allowed}


def ids(*tokens: str) -> list[int]:
    """The ids of tokens by what they spell; "(end)" is the end."""
    return [END if token == "(end)" else VOCABULARY.index(token.encode()) for token in tokens]


class _Small:
    """A tokenizer of VOCABULARY, the longest token first; ``MARK`` is no text."""

    vocab_size = len(VOCABULARY)

    def vocabulary(self) -> list[bytes]:
        """Each token's bytes."""
        return [*VOCABULARY[:-2], b"<end>", b"<mark>"]

    def token_bytes(self, token: int) -> bytes:
        """A token's bytes."""
        return self.vocabulary()[token]

    def marks(self) -> list[int]:
        """Tokens that are no text."""
        return [END, MARK]

    def text_encoder(self) -> Any:
        """From text to tokens."""

        def encode(text: str) -> list[int]:
            data, ids = text.encode(), []
            while data:
                ids.append(
                    max(
                        (i for i, t in enumerate(VOCABULARY) if t and data.startswith(t)),
                        key=lambda i: len(VOCABULARY[i]),
                    )
                )
                data = data[len(VOCABULARY[ids[-1]]) :]
            return ids

        return encode


@cache
def compiler() -> GrammarCompiler:
    """The library, over the small vocabulary."""
    return GrammarCompiler(cast(Tokenizer, _Small()), len(VOCABULARY), [END])


MORE = [
    r"[0-9]+\.[0-9][0-9]",
    "yes|no",
    "(an|a)*b",
    "é+|yes*",
    r"\[([0-9]+(, [0-9]+)*)?\]",
    "(a|b)*abb",
    "[é-ìa]*b",
]


@pytest.mark.parametrize("pattern", MORE)
def test_the_librarys_masks_are_these(pattern: str) -> None:
    """But where one byte only can come: there the library leaves the token that would be written."""
    rng = random.Random(pattern)
    for _ in range(4):
        by_hand, library = (
            constraint_ref(pattern, VOCABULARY, [END])(),
            compiler().compile(regex_grammar(pattern))(),
        )
        tokens: list[int] = []
        for _ in range(8):
            own, theirs = names(by_hand(tokens)), names(library(tokens))
            text = b"".join(VOCABULARY[token] for token in tokens)
            if len({token[0] for token in own}) > 1:
                assert own == theirs, text
            assert own >= theirs and bool(own) == bool(theirs), text
            going = [token for token, one in enumerate(VOCABULARY) if one and one in theirs]
            if not going:
                break
            tokens.append(rng.choice(going))


class Watched:
    """A matcher that says what it was told."""

    def __init__(self, pattern: str) -> None:
        self.matcher = compiler().compile(regex_grammar(pattern))()._matcher
        self.told: list[int] = []

    def consume_tokens(self, tokens: list[int]) -> bool:
        """Note them."""
        self.told += tokens
        return self.matcher.consume_tokens(tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.matcher, name)


def watched(pattern: str, vocab_size: int = len(VOCABULARY)) -> tuple[GrammarConstraint, Watched]:
    """A place in a pattern, and its matcher."""
    matcher = Watched(pattern)
    return GrammarConstraint(cast(LLMatcher, matcher), vocab_size, [END]), matcher


def test_what_was_drawn_is_told_once() -> None:
    place, matcher = watched("[ab]*c")
    tokens: list[int] = []
    assert names(place(tokens)) == {b"a", b"b", b"ab", b"aab", b"ba", b"bab", b"c"} and matcher.told == []
    tokens += ids("ab")  # the same list, longer
    place(tokens)
    assert matcher.told == ids("ab")
    tokens += ids("a", "b")  # two at once, as guesses that were right
    place(tokens)
    assert matcher.told == ids("ab", "a", "b")
    tokens += ids("c")
    assert names(place(tokens)) == {b"(end)"} and matcher.told == tokens
    assert tokens == ids("ab", "a", "b", "c"), "the list is the answer's"


def test_who_asks_twice_hears_the_same() -> None:
    place, matcher = watched("a+b")
    assert place(ids("a")) == place(ids("a")) and matcher.told == ids("a")
    assert names(place(ids("a", "ab"))) == {b"(end)"}


def test_what_is_drawn_last_is_in_the_mask() -> None:
    place, _ = watched("ab|c")
    assert names(place([])) == {b"a", b"ab", b"c"} and names(place(ids("c"))) == {b"(end)"}


def test_behind_its_end_a_form_is_told_nothing() -> None:
    place, matcher = watched("ab?")
    assert names(place(ids("a"))) == {b"b", b"(end)"}
    over = ids("a", "(end)")
    assert names(place(over)) <= {b"(end)"} and matcher.is_stopped()
    told = matcher.told.copy()
    assert names(place([*over, *ids("b")])) <= {b"(end)"} and matcher.told == told
    assert not matcher.is_error()


def test_a_mask_is_as_long_as_the_models_vocabulary() -> None:
    for size in (len(VOCABULARY), 256, 100, 50):
        (place, _), (whole, _) = watched("[a-c]+", size), watched("[a-c]+")
        mask = place([])
        assert isinstance(mask, bytes) and mask == whole([])[:size] and any(mask) == (size > 97)


def test_the_end_waits_for_what_is_complete() -> None:
    place = compiler().compile(lark_grammar('start: "a" <[*]> "b"'))()
    assert not place(ids("a"))[END], "the library counts it among any token"
    assert names(place(ids("a", "no"))) == {b"b"}


def test_where_the_library_gives_up_the_answer_hears_of_it() -> None:
    place, _ = watched("ab")
    with pytest.raises(ValueError):
        place(ids("no"))


def test_the_library_may_give_up_over_a_mask() -> None:
    class Failing(Watched):
        failed = False

        def compute_logit_bias(self) -> bytes:
            """A mask, and a fault."""
            self.failed = True
            return bytes(len(VOCABULARY))

        def is_error(self) -> bool:
            """Whether it has failed."""
            return self.failed

        def get_error(self) -> str:
            """What the library says of a form that grows."""
            return "Too many items (limit 2000)\n<state>"

    place = GrammarConstraint(cast(LLMatcher, Failing("ab")), len(VOCABULARY), [END])
    with pytest.raises(ValueError, match="it is too complex"):
        place([])


def test_guesses_are_counted_up_to_the_first_that_cannot_come() -> None:
    place, _ = watched("(ab)*c")
    assert place.count_allowed([], ids("a", "ba", "b", "c")) == 4
    assert place.count_allowed([], ids("a", "b", "b", "c")) == 2, "one behind the other"
    assert place.count_allowed([], ids("b")) == 0 and place.count_allowed([], []) == 0
    assert place.count_allowed([], ids("c", "(end)", "a")) <= 2


def test_guesses_come_behind_what_has_not_been_told_yet() -> None:
    place, _ = watched("(ab)*c")
    place(ids("ab"))
    assert place.count_allowed(ids("ab", "a"), ids("b", "a", "a")) == 2
    assert place.count_allowed(ids("ab", "a", "ba"), ids("b", "c")) == 2
    assert place.count_allowed(ids("ab", "a", "ba"), ids("a")) == 0
    assert place.count_allowed(ids("ab", "a", "a"), ids("b")) == 0, (
        "what cannot come itself has nothing behind"
    )


def test_what_has_been_told_is_not_told_again() -> None:
    place, _ = watched("ab(ba)?c")
    place(ids("ab"))
    assert place.count_allowed(ids("ab", "b"), ids("a", "c")) == 2


def test_to_count_moves_nothing() -> None:
    place, matcher = watched("(ab)*c")
    place(ids("ab"))
    tokens, guesses = ids("ab", "a"), ids("b", "c")
    assert place.count_allowed(tokens, guesses) == 2 == place.count_allowed(tokens, guesses)
    assert matcher.told == ids("ab") and tokens == ids("ab", "a") and guesses == ids("b", "c")
    assert names(place(ids("ab", "ab"))) == {b"a", b"ab", b"c"}
    assert matcher.told == ids("ab", "ab"), "another token came than was counted"


def test_a_copy_goes_on_by_itself() -> None:
    place, _ = watched("(ab)*c")
    own = compiler().compile(regex_grammar("(ab)*c"))()
    own(ids("a"))
    fork = copy(own)
    fork(ids("a", "b", "c"))
    assert names(own(ids("a", "b"))) == names(place(ids("a", "b")))
