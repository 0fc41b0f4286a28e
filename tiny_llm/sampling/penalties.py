"""Owns what changes logits before a token is drawn: penalties, biases, the ban on an early end.

Many rows in one call; what a row becomes depends on that row alone. Repetition comes first, then
presence and frequency, then biases. Knows no sequence: a row is told its tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from math import inf

import mlx.core as mx

from tiny_llm.sampling_params import SamplingParams


@dataclass(slots=True)
class History:
    """The tokens that a row's penalties look at. ``end_ids`` end the answer, and may come too early."""

    prompt: frozenset[int]
    end_ids: Collection[int]
    answer: Counter[int] = field(default_factory=Counter)

    def copy(self) -> History:
        """One that has seen the same, and goes its own way from here."""
        return replace(self, answer=self.answer.copy())


def looks_back(params: SamplingParams) -> bool:
    """Whether ``penalize`` looks at the tokens that an answer has: the newest one changes the next row."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def changes_logits(params: SamplingParams, answered: int) -> bool:
    """Whether ``penalize`` would do anything to a row after ``answered`` tokens."""
    return looks_back(params) or bool(params.logit_bias) or answered < params.min_tokens


def penalize(logits: mx.array, rows: Iterable[tuple[int, SamplingParams, History, int]]) -> mx.array:
    """Return logits [R, V] as float32, some ``rows`` changed: (which, by what, its history, answered).

    ``answered`` counts the tokens before it, those included that no history knows yet.

    Raises ValueError for an id that is not in the vocabulary: MLX would write to memory beyond the row.
    """
    scores = logits.astype(mx.float32)
    seen: list[tuple[int, int, float]] = []
    added: list[tuple[int, int, float]] = []
    for row, own, history, answered in rows:
        if own.repetition_penalty != 1:
            seen += [(row, token, own.repetition_penalty) for token in history.prompt | history.answer.keys()]
        added += [(row, token, amount) for token, amount in _added(own, history, answered).items()]
    if seen:
        at, factors = _entries(seen, scores.shape[-1])
        found = scores[at]
        scores[at] = mx.where(found > 0, found / factors, found * factors)
    if added:
        at, amounts = _entries(added, scores.shape[-1])
        scores = scores.at[at].add(amounts)
    return scores


def _added(params: SamplingParams, history: History, answered: int) -> dict[int, float]:
    """What is added to a row, summed here for each token: a GPU adds to one place in any order."""
    amounts: dict[int, float] = {}
    if params.presence_penalty or params.frequency_penalty:
        for token, times in history.answer.items():
            amounts[token] = -(params.presence_penalty + params.frequency_penalty * times)
    for token, bias in (params.logit_bias or {}).items():
        amounts[token] = amounts.get(token, 0.0) + bias
    if answered < params.min_tokens:
        amounts |= dict.fromkeys(history.end_ids, -inf)
    return amounts


def _entries(
    entries: Iterable[tuple[int, int, float]], vocab: int
) -> tuple[tuple[mx.array, mx.array], mx.array]:
    rows, ids, values = zip(*entries, strict=True)
    if min(ids) < 0 or max(ids) >= vocab:
        raise ValueError(f"[penalize] expected token ids from 0 to {vocab - 1}, got {min(ids)} to {max(ids)}")
    return (mx.array(rows), mx.array(ids)), mx.array(values, mx.float32)
