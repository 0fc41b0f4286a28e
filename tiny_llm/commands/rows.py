"""Owns an answer as an object of JSON, as commands print it."""

from __future__ import annotations

from collections.abc import Mapping

from tiny_llm.data import Completion

LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""


def row_of(completion: Completion) -> dict[str, object]:
    """What every row says of an answer; ``logprobs`` are by token id, as text."""
    timing, rows = completion.timing, completion.logprobs
    return {
        "index": completion.index,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": timing.prompt_tokens,
        "completion_tokens": timing.completion_tokens,
        "ttft_s": round(timing.ttft_s, 6),
        "logprobs": None if rows is None else [_finite(row) for row in rows],
    }


def _finite(row: Mapping[int, float]) -> dict[str, float]:
    return {str(token): round(max(value, LEAST_LOGPROB), 6) for token, value in row.items()}
