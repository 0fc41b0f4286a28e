"""Guesses from a text that repeats itself, which of them count, and how many are worth their rows."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import cast

import pytest

from tiny_llm.data import Sequence, StepCosts
from tiny_llm.decoding.answer import Answer
from tiny_llm.decoding.decide import Decision, Row, _guessed_right
from tiny_llm.decoding.ngram import _place, ngram_draft
from tiny_llm.scheduler.drafts import Acceptance, Worth
from tiny_llm.scheduler.speed import StepTime

pytestmark = pytest.mark.chapter("2.11")


def ids(*tokens: int) -> array[int]:
    """Tokens as a sequence has them."""
    return array("i", tokens)


def place(*tokens: int) -> int | None:
    """Where a text goes on that ends like an earlier part of itself."""
    return _place(ids(*tokens), ids(*tokens))


def drafted(most: int, *tokens: int) -> list[int]:
    """Guesses of what follows."""
    return ngram_draft(Sequence(0, ids(*tokens)), most).tolist()


def test_a_text_goes_on_behind_what_agrees() -> None:
    assert place(1, 2, 3, 9, 8, 1, 2, 3) == 3, "9 came behind 1 2 3"
    assert place(1, 2, 3, 4, 5) is None, "nothing like it came before"
    assert place(5, 2, 3, 9, 8, 1, 2, 3) is None, "three tokens must agree, two are chance"
    assert place(1, 2) is None and place() is None and place(1, 2, 3) is None, (
        "its own end is no earlier part"
    )


def test_the_latest_of_equals_is_taken() -> None:
    assert place(1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3) == 7, "8 is later than 7"


def test_what_agrees_longer_is_taken_before_what_is_later() -> None:
    assert place(6, 5, 1, 2, 3, 7, 4, 1, 2, 3, 8, 6, 5, 1, 2, 3) == 5, (
        "five agree with the first, three with the second"
    )


def test_places_may_overlap_the_end() -> None:
    assert place(4, 4, 4, 4) == 3 and place(4, 4, 4, 4, 4) == 4, (
        "the text of one token repeats itself at once"
    )
    assert place(1, 2, 1, 2, 1) == 3


def test_tokens_are_compared_and_not_their_bytes() -> None:
    same = 0x01010101
    text = (0x01000005, same, same, 0x11010101, 7, 8, same, same, same)
    assert place(*text) is None, "the same twelve bytes stand there three bytes further, but only two tokens"


def test_a_place_may_overlap_the_one_behind_it() -> None:
    assert place(9, 4, 4, 4, 4, 5, 9, 4, 4, 4) == 4, (
        "four agree with the first three 4, three with the second"
    )


def test_only_the_last_places_are_compared() -> None:
    far = [9, 9, 1, 2, 3, 5]
    near = [token for n in range(40) for token in (100 + n, 1, 2, 3, 6)]
    assert place(*far, *near, 9, 9, 1, 2, 3) == len(far) + len(near) - 1, "sixteen, the latest first"


def test_another_text_may_be_looked_through() -> None:
    assert _place(ids(7, 1, 2, 3, 4), ids(1, 2, 3)) == 4, "the end of the one in the other"
    assert _place(ids(7, 1, 2, 3), ids(1, 2, 3)) is None, "at its end nothing goes on"
    assert _place(ids(1, 2, 3, 4, 5), ids(2, 3)) is None, "too short a tail"


def test_a_draft_is_what_followed() -> None:
    assert drafted(2, 1, 2, 3, 9, 8, 1, 2, 3) == [9, 8]
    assert drafted(1, 1, 2, 3, 9, 8, 1, 2, 3) == [9] and drafted(4, 1, 2, 3, 4) == []


def test_a_draft_goes_on_around_what_repeats() -> None:
    assert drafted(7, 1, 2, 3, 9, 8, 1, 2, 3) == [9, 8, 1, 2, 3, 9, 8], "as the text would, if it went on so"
    assert drafted(3, 4, 4, 4, 4) == [4, 4, 4]


def test_a_draft_leaves_the_text_alone() -> None:
    seq = Sequence(0, ids(1, 2, 3, 9, 1, 2, 3))
    assert isinstance(ngram_draft(seq, 5), array) and seq.tokens == ids(1, 2, 3, 9, 1, 2, 3)


def row(position: int, *guesses: int) -> Row:
    """A row that counts on guesses."""
    return Row(0, cast(Answer, SimpleNamespace(prompt_len=0)), position, ids(*guesses))


def decided(position: int, token: int) -> Decision:
    """What was drawn at a position."""
    return Decision(row(position), token, None, None)


def test_a_row_without_guesses_always_counts() -> None:
    assert _guessed_right([], row(5)) and _guessed_right([decided(4, 9)], row(5))


def test_a_guess_is_right_if_it_was_drawn() -> None:
    assert _guessed_right([decided(5, 7)], row(6, 7)), "7 was guessed at 5, and drawn there"
    assert not _guessed_right([decided(5, 8)], row(6, 7))
    assert _guessed_right([decided(5, 7), decided(6, 9)], row(7, 7, 9)), "the last of them is compared"
    assert not _guessed_right([decided(5, 7), decided(6, 8)], row(7, 7, 9))
    assert not _guessed_right([decided(5, 7), decided(6, 7)], row(7, 7, 9)), "7 was guessed, but not there"


def test_behind_a_wrong_guess_nothing_counts() -> None:
    assert not _guessed_right([decided(5, 9)], row(7, 8, 9)), "9 was drawn at 5, and guessed at 6"
    assert not _guessed_right([], row(6, 7)), "what stood before it was dropped"


def test_what_is_believed_moves_with_each_guess() -> None:
    known = Acceptance()
    assert known.share == 0.6
    known.observe(1, 1)
    assert known.share == pytest.approx(0.6 + 0.15 * 0.4)
    known.observe(1, 0)
    assert known.share == pytest.approx(0.66 * 0.85)


def test_behind_the_first_wrong_guess_nothing_is_known() -> None:
    one, other = Acceptance(), Acceptance()
    one.observe(8, 0)
    other.observe(1, 0)
    assert one.share == other.share == pytest.approx(0.51), "seven were not looked at"
    three = Acceptance()
    three.observe(3, 3)
    assert three.share == pytest.approx(1 - 0.4 * 0.85**3), "all were right: none was wrong"
    mixed = Acceptance()
    mixed.observe(4, 1)
    assert mixed.share == pytest.approx(0.66 * 0.85)


def worth(decodes: int, row_ms: float) -> Worth:
    """A step of 20 ms, and so many for each row."""
    speed = StepTime(StepCosts(20.0, row_ms, 0.0, 1.0, 0.0))
    speed._doubts = [[0.0] * 5 for _ in range(5)]
    return Worth(speed, decodes, 0)


def test_a_guess_pays_while_it_brings_more_than_its_row_costs() -> None:
    assert worth(1, 0.01).length(0.5, 16) == 9, "0.5 ** 9 tokens in 0.01 ms, against 2 tokens in 20 ms"
    assert worth(1, 5.0).length(0.5, 16) == 1, "1 token in 25 ms: 0.5 in 5 ms are more, 0.25 are not"
    assert worth(1, 0.01).length(0.0, 16) == 0 and worth(1, 100.0).length(0.5, 16) == 0


def test_no_more_than_there_are() -> None:
    assert worth(1, 0.01).length(1.0, 3) == 3 and worth(1, 0.01).length(0.9, 0) == 0


def test_in_a_large_batch_rows_are_all_that_counts() -> None:
    assert worth(400, 1.0).length(0.6, 16) == 0, "a token takes 1.05 ms there, and a guess 1 ms for 0.6"
    assert worth(400, 1.0).length(0.99, 16) > 0, "one that is nearly sure still pays"


def test_one_sequence_s_guesses_are_in_the_step_when_the_next_asks() -> None:
    shared, alone = worth(2, 3.0), worth(2, 3.0)
    assert shared.length(0.9, 16) == alone.length(0.9, 16) > 1
    assert shared._tokens > 2 and shared._ms > 26
    assert shared.length(0.4, 16) < worth(2, 3.0).length(0.4, 16), (
        "the step has become better, a weak guess pays less"
    )
