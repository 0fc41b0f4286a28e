"""Owns what commands read and print of a conversation: stdin, messages, an answer in two forms."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Annotated

from tiny_llm.data import Chunk, Completion
from tiny_llm.errors import RequestError
from tiny_llm.options import option
from tiny_llm.sampling_params import SamplingParams

SystemOption = Annotated[str | None, option("Prompt", "How the model is to behave.")]
ANSWER = SamplingParams(max_tokens=512)  # what people get who do not say how to answer
LEAST_LOGPROB = -9999.0  # JSON has no infinity


def messages_of(system: str | None, question: str) -> list[dict[str, str]]:
    """A conversation that asks ``question``. Raises RequestError if that is empty."""
    if not question.strip():
        raise RequestError("The prompt is empty; say something, by --prompt TEXT or through a pipe.")
    asked = {"role": "user", "content": question}
    return [asked] if system is None else [{"role": "system", "content": system}, asked]


def read_stdin() -> str:
    """All of stdin without the newline at its end. Raises RequestError if it is a terminal, or no UTF-8."""
    if sys.stdin.isatty():
        raise RequestError("There is no prompt; give --prompt TEXT, or pipe a text in.")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"The text on stdin is not valid UTF-8 at byte {error.start}; convert it first (iconv -t UTF-8)."
        ) from error


def print_stream(chunks: Iterator[Chunk]) -> Completion:
    """Print one answer as it comes, and return the whole."""
    completion = None
    for chunk in chunks:
        print(chunk.text, end="", flush=True)
        completion = chunk.completion
    print()
    assert completion is not None
    return completion


def row_of(completion: Completion) -> dict[str, object]:
    """What every row of JSON says of an answer; ``logprobs`` are by token id, as text."""
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
