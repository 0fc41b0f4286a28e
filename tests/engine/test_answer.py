"""What an answer remembers can be copied at any token: both go on as if each had been alone."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_llm.data import Sequence
from tiny_llm.decoding.answer import Answer
from tiny_llm.engine.llm import LLM
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.tokenizer.tokenizer import Tokenizer

PROMPT = [5, 6, 7]


class Counting:
    """A form that remembers how much it has seen."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, answer: list[int]) -> bytes:
        self.seen = len(answer)
        return bytes(4)


def begun(tokenizer: Tokenizer, params: SamplingParams) -> Answer:
    sequence = Sequence(1, array("i", PROMPT), params)
    return Answer.begun(0, 1, sequence, params, tokenizer.stream(), {2})


def feed(answer: Answer, tokens: Seq[int]) -> list[str]:
    """The pieces that come of tokens, each of which the scheduler would commit."""
    pieces = []
    for token in tokens:
        if answer.ended:
            break
        pieces.append(answer.push(token, {token: -1.0}))
        answer.tokens.append(token)
        assert answer.form is not None
        answer.form(answer.token_ids)
    return pieces


def remembered(answer: Answer) -> tuple[object, ...]:
    assert isinstance(answer.form, Counting)
    checker = answer.checker
    return (
        answer.token_ids,
        checker.text,
        checker.finish_reason,
        checker.num_tokens,
        checker.shown_tokens,
        answer.history.answer,
        answer.form.seen,
        answer.logprobs,
    )


@pytest.fixture(scope="module")
def tokenizer(llm: LLM) -> Tokenizer:
    return llm.tokenizer


@settings(max_examples=150)
@given(data=st.data())
def test_a_copy_at_any_token_goes_its_own_way(data: st.DataObject, tokenizer: Tokenizer) -> None:
    ids = st.lists(st.integers(0, 2047), max_size=12)
    before, ours, theirs = data.draw(ids), data.draw(ids), data.draw(ids)
    params = SamplingParams(
        stop=tuple(data.draw(st.lists(st.text("ae. ", min_size=1, max_size=3), max_size=2))),
        min_tokens=data.draw(st.integers(0, 6)),
        repetition_penalty=1.2,
        constraint=Counting,
    )
    answer = begun(tokenizer, params)
    feed(answer, before)
    copied = answer.copy(index=1, seq_id=9)
    assert (copied.index, copied.seq_id, copied.prompt_len) == (1, 9, len(PROMPT))
    feed(answer, ours)
    feed(copied, theirs)
    for got, tokens in ((answer, [*before, *ours]), (copied, [*before, *theirs])):
        whole = begun(tokenizer, params)
        feed(whole, tokens)
        assert remembered(got) == remembered(whole)


def test_a_copy_holds_the_bytes_of_an_unfinished_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ü€😀")
    for cut in range(len(ids)):
        answer = begun(tokenizer, SamplingParams(constraint=Counting))
        said = feed(answer, ids[:cut])
        copied = answer.copy(1, 2)
        assert "".join(said + feed(copied, ids[cut:])) == "".join(said + feed(answer, ids[cut:])) == "ü€😀"
