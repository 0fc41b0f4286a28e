"""Owns what changes logits before a token is drawn: penalties, biases, the ban on an early end.

Many rows in one call; what a row becomes depends on that row alone. Repetition comes first, then
presence and frequency, then biases. Knows no sequence: a row is told its tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf

import mlx.core as mx

from tiny_llm.data import SamplingParams


@dataclass(slots=True)
class History:
    """The tokens that a row's penalties look at. ``end_ids`` end the answer, and may come too early."""

    prompt: frozenset[int]
    end_ids: Collection[int]
    answer: Counter[int] = field(default_factory=Counter)


def changes_logits(params: SamplingParams, answered: int) -> bool:
    """Whether ``penalize`` would do anything to a row after ``answered`` tokens."""
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or bool(params.logit_bias)
        or answered < params.min_tokens
    )


def penalize(
    logits: mx.array, rows: Sequence[int], params: Sequence[SamplingParams], histories: Sequence[History]
) -> mx.array:
    """Return logits [R, V] as float32 with ``rows`` changed by their ``params`` and ``histories``.

    Raises ValueError for an id that is not in the vocabulary: MLX would write to memory beyond the row.
    """
    scores = logits.astype(mx.float32)
    each = list(zip(rows, params, histories, strict=True))
    repeated = [(r, p.repetition_penalty, h) for r, p, h in each if p.repetition_penalty != 1]
    seen = [(r, i, factor) for r, factor, h in repeated for i in h.prompt | h.answer.keys()]
    if seen:
        at, factors = _entries(seen, scores.shape[-1])
        found = scores[at]
        scores[at] = mx.where(found > 0, found / factors, found * factors)
    added = [
        *((r, i, -_penalty(p, n)) for r, p, h in each for i, n in h.answer.items()),
        *((r, i, bias) for r, p, _ in each for i, bias in (p.logit_bias or {}).items()),
        *((r, i, -inf) for r, p, h in each if h.answer.total() < p.min_tokens for i in h.end_ids),
    ]
    if added:
        at, amounts = _entries(added, scores.shape[-1])
        scores = scores.at[at].add(amounts)
    return scores


def _entries(
    entries: Iterable[tuple[int, int, float]], vocab: int
) -> tuple[tuple[mx.array, mx.array], mx.array]:
    rows, ids, values = zip(*entries, strict=True)
    if min(ids) < 0 or max(ids) >= vocab:
        raise ValueError(f"[penalize] expected token ids from 0 to {vocab - 1}, got {min(ids)} to {max(ids)}")
    return (mx.array(rows), mx.array(ids)), mx.array(values, mx.float32)


def _penalty(params: SamplingParams, count: int) -> float:
    return params.presence_penalty + params.frequency_penalty * count
