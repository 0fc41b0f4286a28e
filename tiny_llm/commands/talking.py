"""Owns what commands read and print of a conversation: stdin, messages, an answer as it is made."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

from tiny_llm.data import Chunk, Completion
from tiny_llm.errors import RequestError
from tiny_llm.options import option
from tiny_llm.sampling_params import SamplingParams

SystemOption = Annotated[str | None, option("Prompt", "How the model is to behave.")]
ANSWER = SamplingParams(max_tokens=512)
"""What people get who do not say how to answer."""


def messages_of(system: str | None, question: str) -> list[dict[str, str]]:
    """A conversation that asks ``question``. Raises RequestError if that is empty."""
    if not question.strip():
        raise RequestError("The prompt is empty; say something, by --prompt TEXT or through a pipe.")
    asked = {"role": "user", "content": question}
    return [asked] if system is None else [{"role": "system", "content": system}, asked]


def read_stdin() -> str:
    """All of stdin without the newline at its end. Raises RequestError if it is not UTF-8."""
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
