"""Owns the log-probabilities that are reported beside a token; it chooses none.

They are those of the model itself: log-softmax of the raw logits, before temperature
and filters, as the OpenAI API and vLLM (by default) report them.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from tiny_llm.ops.argmax import largest
from tiny_llm.ops.backend import cpu, on_cpu
from tiny_llm.ops.sums import row_sums

Reported = tuple[mx.array, mx.array, mx.array]


def log_probabilities(logits: mx.array) -> mx.array:
    """Log-softmax over the vocabulary: [R, V] -> float32 [R, V], ``x - log(sum(exp(x)))``."""
    scores = logits.astype(mx.float32)
    scores = scores - mx.max(scores, axis=-1, keepdims=True)  # small numbers keep their last bits
    return scores - mx.log(row_sums(mx.exp(scores)))


def reported(logits: mx.array, tokens: mx.array, count: int) -> Reported:
    """Return what is reported of each row, lazily, for logits [R, V] and chosen tokens uint32 [R].

    The tokens' own log-probabilities [R]; the ids [R, k] of the ``count`` likeliest, best first,
    k being ``count`` or V; and their log-probabilities [R, k].
    """
    scores, count = logits.astype(mx.float32), min(count, logits.shape[-1])
    if on_cpu("logprobs", scores):
        return cpu.logprobs(scores, tokens, count)
    return reported_ref(scores, tokens, count)


def reported_ref(logits: mx.array, tokens: mx.array, count: int) -> Reported:
    """Plain mlx.core: all log-probabilities, of which a few are taken."""
    logp = log_probabilities(logits)
    chosen = mx.take_along_axis(logp, tokens[:, None], axis=-1)[:, 0]
    best = largest(logp, count)
    return chosen, best, mx.take_along_axis(logp, best, axis=-1)


def named(token: int, chosen: float, ids: list[int], values: list[float]) -> dict[int, float]:
    """One row's report as {token id: log-probability}: the chosen one first, and not repeated."""
    return {token: chosen} | dict(zip(ids, values, strict=True))


def top_logprobs(logits: mx.array, token: int, count: int) -> dict[int, float]:
    """The chosen token's log-probability, then the ``count`` likeliest, best first: logits [V].

    The chosen one is not repeated, so there are ``count`` or ``count + 1`` entries.
    Evaluates its arrays.
    """
    rows = reported(logits[None], mx.array([token], mx.uint32), count)
    chosen, ids, values = (cast(list[list[float]], array.tolist()) for array in rows)
    return named(token, cast(float, chosen[0]), cast(list[int], ids[0]), values[0])
