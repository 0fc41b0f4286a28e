"""Guesses without a model: where a text repeats itself, and where it follows what the caller predicts."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_llm.data import Sequence
from tiny_llm.decoding.ngram import ngram_draft, predicted_draft
from tiny_llm.errors import RequestError
from tiny_llm.sampling_params import SamplingParams


def draft(
    tokens: list[int], most: int, *, answer: list[int] | None = None, prediction: tuple[int, ...] = ()
) -> list[int]:
    seq = Sequence(1, array("i", tokens), SamplingParams(prediction=prediction))
    seq.tokens.extend(answer or [])
    return (predicted_draft(seq, most) or ngram_draft(seq, most)).tolist()


def test_a_text_goes_on_as_it_did_before() -> None:
    assert draft([1, 2, 3, 4, 5, 6, 1, 2, 3], 3) == [4, 5, 6]
    assert draft([1, 2, 3, 4, 5, 1, 2], 3) == [], "two tokens are no sign"


def test_the_longest_agreement_wins_and_the_latest_of_equals() -> None:
    assert draft([9, 1, 2, 3, 4, 8, 1, 2, 3, 5, 9, 1, 2, 3], 1) == [4]
    assert draft([8, 1, 2, 3, 4, 8, 1, 2, 3, 5, 8, 1, 2, 3], 1) == [5]


def test_what_repeats_goes_on_repeating() -> None:
    assert draft([7, 7, 7, 7], 5) == [7] * 5
    assert draft([1, 2, 3, 4, 1, 2, 3, 4], 6) == [1, 2, 3, 4, 1, 2]


def test_a_predicted_answer_is_followed_from_its_start_and_found_again_after_a_miss() -> None:
    predicted = (11, 12, 13, 14, 15, 16, 17, 18)
    assert draft([1, 2, 3], 4, prediction=predicted) == [11, 12, 13, 14]
    assert draft([1, 2, 3], 4, answer=[11, 12], prediction=predicted) == [13, 14, 15, 16]
    assert draft([1, 2, 3], 4, answer=[11, 12, 99], prediction=predicted) == []
    assert draft([1, 2, 3], 4, answer=[11, 99, 13, 14, 15], prediction=predicted) == [16, 17, 18]
    assert draft([1, 2, 3], 4, answer=list(predicted), prediction=predicted) == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(1, 16))
def test_a_draft_is_what_followed_the_longest_agreement(tokens: list[int], most: int) -> None:
    """By looking at every place one by one."""

    def agreeing(place: int) -> int:
        count = 0
        while count < place and tokens[place - 1 - count] == tokens[-1 - count]:
            count += 1
        return count

    lengths = {place: min(32, agreeing(place)) for place in range(3, len(tokens))}
    latest = sorted((place for place, length in lengths.items() if length >= 3), reverse=True)[:16]
    if not latest:
        assert draft(tokens, most) == []
        return
    best = max(latest, key=lambda place: (lengths[place], place))
    text = list(tokens)
    for _ in range(most):
        text.append(text[best + len(text) - len(tokens)])
    assert draft(tokens, most) == text[len(tokens) :]


@pytest.mark.parametrize("given", [(-1,), (1.5,), ("a",)])
def test_a_prediction_is_token_ids(given: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"prediction is .* token ids"):
        SamplingParams(prediction=given)
