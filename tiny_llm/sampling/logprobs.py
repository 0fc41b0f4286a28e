"""Owns the log-probabilities that are reported beside a token; it chooses none.

They are those of the model itself: log-softmax of the raw logits, before temperature
and filters, as the OpenAI API and vLLM (by default) report them.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx


def log_probabilities(logits: mx.array) -> mx.array:
    """Log-softmax over the vocabulary: [R, V] -> float32 [R, V], ``x - log(sum(exp(x)))``."""
    scores = logits.astype(mx.float32)
    scores = scores - mx.max(scores, axis=-1, keepdims=True)  # small numbers keep their last bits
    return scores - mx.logsumexp(scores, axis=-1, keepdims=True)


def top_logprobs(logits: mx.array, token: int, count: int) -> dict[int, float]:
    """The chosen token's log-probability, then the ``count`` likeliest, best first: logits [V].

    The chosen one is not repeated, so there are ``count`` or ``count + 1`` entries.
    Evaluates its arrays.
    """
    logp = log_probabilities(logits[None])[0]
    best = mx.argpartition(-logp, min(count, logp.size - 1))[:count]
    ids = [token, *cast(list[int], best.tolist())]
    values = cast(list[float], logp[mx.array(ids)].tolist())
    chosen, *likeliest = zip(ids, values, strict=True)
    return dict([chosen, *sorted(likeliest, key=lambda entry: (-entry[1], entry[0]))])
