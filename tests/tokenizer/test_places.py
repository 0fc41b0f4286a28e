"""What a token adds to a text lies from its place to the next one's, on every kind of tokenizer."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from tiny_llm.tokenizer.files import TokenizerFiles
from tiny_llm.tokenizer.places import TokenPlaces, places_of
from tiny_llm.tokenizer.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
TEXTS = st.text(st.sampled_from("ab e.é你😀 \n"), max_size=24)


def tokenizer_of(backend: Backend) -> Tokenizer:
    return Tokenizer(TokenizerFiles(backend, special_tokens={}, templates={}, add_bos=None))


def expected(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """By decoding the tokens before each, without what is not finished of a character; none goes back."""
    befores = [tokenizer.decode(ids[:count], skip_special_tokens=False) for count in range(len(ids))]
    return list(accumulate((len(before.rstrip(UNFINISHED)) for before in befores), max))


@settings(max_examples=80)
@given(text=TEXTS)
def test_the_places_of_a_prompt_are_those_in_its_text(backend: Backend, text: str) -> None:
    tokenizer = tokenizer_of(backend)
    ids = tokenizer.encode(text)
    places = tokenizer.places(text, ids)
    assert len(places) == len(ids) and places == sorted(places)
    assert all(0 <= place <= len(text) for place in places)
    if tokenizer.decode(ids, skip_special_tokens=False) == text:
        shown = [backend.id_to_token(i) for i in ids]
        assert places == expected(tokenizer, ids), f"{text!r} as {shown}"


@pytest.mark.slow
@settings(max_examples=80)
@given(data=st.data())
def test_the_places_of_any_tokens_are_those_of_what_they_add(backend: Backend, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(backend)
    token_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=4)
    written = TEXTS.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    ids = [token for part in data.draw(st.lists(token_ids | written, max_size=5)) for token in part]
    begin = data.draw(st.sampled_from([0, 7]))
    stream = TokenPlaces(tokenizer.stream(skip_special_tokens=False), begin)
    places = [stream.take(token) - begin for token in ids]
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert places == sorted(places) and all(place <= len(whole) for place in places)
    if UNFINISHED not in whole:  # else some bytes are no text, and the decoder says when they are given up
        assert places == expected(tokenizer, ids), [backend.id_to_token(i) for i in ids]


@pytest.mark.parametrize(
    ("spans", "places"),
    [
        ([(0, 0), (0, 5), (5, 7)], [0, 0, 5]),  # a BOS that the text lacks
        ([(0, 2), (3, 5), (0, 0)], [0, 2, 5]),  # the space is the second token's; an EOS at the end
        ([(0, 1), (1, 2), (1, 2), (2, 3)], [0, 1, 1, 2]),  # one character of two tokens
        ([(0, 2), (1, 2), (2, 3)], [0, 1, 2]),  # a space and half a character, its other half
        ([], []),
    ],
)
def test_places_by_spans(spans: list[tuple[int, int]], places: list[int]) -> None:
    assert places_of(spans) == places
