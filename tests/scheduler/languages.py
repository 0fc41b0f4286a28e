"""Languages that are made up, and beam searches in them: what tests of beams share. No model."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from itertools import count
from math import log
from typing import Any

from tiny_llm.data import Advance, Sequence
from tiny_llm.decoding.answer import Answer
from tiny_llm.decoding.beam import BeamSearch
from tiny_llm.decoding.decide import Decision, Row
from tiny_llm.sampling_params import BeamParams, SamplingParams

PROMPT = [7, 7, 7]
Language = Callable[[tuple[int, ...]], dict[int, float]]
"""An answer so far -> the log-probabilities of its next tokens."""
Found = list[tuple[tuple[int, ...], Any]]


class Letters:
    """A detokenizer: token 1 is "b", 2 is "c". It remembers what it has seen, as one of bytes would."""

    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def push(self, token: int) -> str:
        self.seen.append(token)
        return chr(ord("a") + token)

    def finish(self) -> str:
        return ""

    def copy(self) -> Letters:
        return Letters(self.seen.copy())


def begun(params: SamplingParams, ends: tuple[int, ...] = (), seq_id: int = 10) -> Answer:
    """An answer without tokens, to a prompt of three."""
    sequence = Sequence(seq_id, array("i", PROMPT), params)
    return Answer.begun(0, seq_id, sequence, params, Letters([]), ends)  # type: ignore[arg-type]


def offered(beam: Answer, likeliest: dict[int, float] | None, error: str | None = None) -> Decision:
    """What the model says of a beam's next token: its candidates, the likeliest first."""
    told = likeliest and dict(sorted(likeliest.items(), key=lambda one: -one[1])[: beam.candidates])
    return Decision(Row(0, beam, len(beam.tokens)), 0, told, error)


def step(search: BeamSearch, language: Language, numbers: Iterator[int]) -> list[Advance]:
    """A token more for all beams."""
    for beam in search.beams:
        search.take(offered(beam, language(tuple(beam.token_ids))))
    return search.advance(numbers)


def searched(language: Language, ends: tuple[int, ...] = (), **asked: Any) -> Found:
    """A whole search: its answers, each with its score."""
    search, numbers = BeamSearch(begun(BeamParams(**asked), ends)), count(11)
    for _ in range(asked["max_tokens"]):
        step(search, language, numbers)
        if search.is_over:
            return [(tuple(answer.token_ids), answer.score) for answer in search.answers()]
    raise AssertionError("the search goes on though no answer may be longer")


def made_up(seed: int, vocab: int = 5) -> Language:
    """A language in which what comes next depends on the whole text."""

    def language(text: tuple[int, ...]) -> dict[int, float]:
        chance = random.Random(f"{seed} {text}")
        weights = [chance.random() ** 3 + 1e-6 for _ in range(vocab)]
        return {token: log(weight / sum(weights)) for token, weight in enumerate(weights)}

    return language
