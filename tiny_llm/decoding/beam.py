"""Owns beam search's arithmetic: which continuations of a request's beams live on, and when it is over.

A beam is an answer in the making. Each brings its likeliest next tokens with their log-probabilities; of all
continuations the best live on, as forks of the beams that they continue. The rules, and so sequences and
scores, are those of transformers' ``generate(num_beams=...)``. Knows no logits, no blocks and no step.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import nlargest
from math import inf

from tiny_llm.data import Advance
from tiny_llm.decoding.answer import Answer, Logprobs
from tiny_llm.decoding.decide import NOTHING_LEFT, Decision
from tiny_llm.sampling_params import BeamParams


class BeamSearch:
    """The search that begins with ``first``, an answer without tokens. ``beams`` live, the best one first.

    ``error`` is what ended it, where something did.
    """

    def __init__(self, first: Answer) -> None:
        assert isinstance(first.params, BeamParams)
        self.beams = [first]
        self.error: str | None = None
        self._params = first.params
        self._empty = first
        self._found: list[Answer] = []  # at most ``width``, the best one first
        self._likeliest: dict[int, Logprobs] = {}  # next tokens, by sequence

    def take(self, decision: Decision) -> None:
        """Note what may come next of a beam. One that has nothing left dies; other faults end the search."""
        failed = decision.error is not None
        self._likeliest[decision.row.answer.seq_id] = {} if failed else decision.logprobs or {}
        if failed and decision.error != NOTHING_LEFT:
            self.error = decision.error

    @property
    def is_ready(self) -> bool:
        """Whether all beams have said what may come next."""
        return len(self._likeliest) == len(self.beams)

    def advance(self, numbers: Iterator[int]) -> list[Advance]:
        """Go on by a token: how the beams' sequences do, but for those of beams that are left behind.

        A beam's first continuation stays in its sequence, others get one of the next ``numbers``.
        """
        width, beams, parts = self._params.width, list[Answer](), dict[int, list[Advance]]()
        for rank, (score, beam, token) in enumerate(self._best_continuations()):
            if len(beams) == width:
                break
            grown = self._grown(beam, token, score)
            if grown.ended and rank < width:
                self._keep(grown)
            elif not grown.ended:
                own = parts.setdefault(beam.seq_id, [])
                grown.seq_id = next(numbers) if own else beam.seq_id
                own.append(Advance(grown.seq_id, (token,)))
                beams.append(grown)
        self.beams, self._likeliest = beams, {}
        if not beams and not self._found:
            self.error = self.error or NOTHING_LEFT
        return [first._replace(forks=tuple(forks)) for first, *forks in parts.values()]

    @property
    def is_over(self) -> bool:
        """Whether the answers are found: no beam is left, or as the rule of ``early_stopping`` says."""
        early, penalty = self._params.early_stopping, self._params.length_penalty
        if not self.beams or self.error is not None:
            return True
        if len(self._found) < self._params.width or early is True:
            return len(self._found) == self._params.width
        best = self.beams[0]
        length = self._params.max_tokens if early == "never" and penalty > 0 else best.checker.num_tokens
        return bool(best.score / length**penalty <= self._found[-1].score)

    def answers(self) -> list[Answer]:
        """The ``n`` best, with their final scores; where the search ended early, beams among them.

        Where there are fewer the rest are empty, of score -inf.
        """
        for beam in self.beams:
            self._finish(beam)
        found = [*self._found, *self.beams][: self._params.n]
        while len(found) < self._params.n:
            found.append(self._empty.copy(len(found), self._empty.seq_id))
            found[-1].score = -inf
        for index, answer in enumerate(found):
            answer.index, answer.error = index, self.error
        return found

    def _best_continuations(self) -> list[tuple[float, Answer, int]]:
        """Score, beam and token of the likeliest: so many that ``width`` are left without an end token."""
        found = [
            (beam.score + logprob, beam, token)
            for beam in self.beams
            for token, logprob in self._likeliest[beam.seq_id].items()
            if logprob > -inf
        ]
        return nlargest(self._empty.candidates, found, key=lambda one: one[0])

    def _grown(self, beam: Answer, token: int, score: float) -> Answer:
        """A beam's copy with one token more."""
        grown, told, asked = beam.copy(beam.index, beam.seq_id), None, self._params.logprobs
        if asked is not None:
            likeliest = self._likeliest[beam.seq_id]
            told = {token: likeliest[token]} | dict(list(likeliest.items())[:asked])
        grown.push(token, told)
        grown.tokens.append(token)
        grown.score = score
        return grown

    def _keep(self, answer: Answer) -> None:
        """An answer is found: keep it if it is among the ``width`` best so far."""
        self._finish(answer)
        self._found = nlargest(self._params.width, [*self._found, answer], key=lambda one: one.score)

    def _finish(self, answer: Answer) -> None:
        """Make a sum of log-probabilities the answer's final score."""
        answer.score /= max(1, answer.checker.num_tokens) ** self._params.length_penalty
