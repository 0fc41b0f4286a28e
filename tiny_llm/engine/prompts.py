"""Owns what a caller may give as prompts and their params. Raises RequestError for what is neither."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from tiny_llm.engine.contexts import Joined
from tiny_llm.errors import RequestError
from tiny_llm.messages.chat_format import ToolChoice, ToolSpec
from tiny_llm.sampling_params import SamplingParams

Prompt = str | Sequence[int]


class ChatOptions(TypedDict, total=False):
    """What may be said of a chat beside its messages; see ``LLM.chat``."""

    tools: Sequence[ToolSpec] | None
    tool_choice: ToolChoice | None
    parallel_tool_calls: bool
    response_format: Mapping[str, object] | None
    contexts: Sequence[str]
    join: Joined
    recompute: int


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A string or a list of numbers is one prompt; everything else is a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, Mapping)):
        raise RequestError(f"prompts is a {type(prompts).__name__}, but must be a string or a list.")
    given = list(prompts)
    if given and all(isinstance(p, int) for p in given):
        return [given]  # type: ignore[list-item]
    return given  # type: ignore[return-value]


def for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, prompts: int
) -> Sequence[SamplingParams | None]:
    """One for each of the ``prompts``; ``check`` says what is wrong with one."""
    if not isinstance(params, (list, tuple)):
        return [params] * prompts  # type: ignore[list-item]
    if len(params) != prompts:
        raise RequestError(
            f"There are {len(params)} params for {prompts} prompts; give one for each, or one for all."
        )
    return params


def as_ids(prompt: Sequence[int], vocab: int) -> list[int]:
    """Token ids as a list, each of them one of ``vocab``."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise RequestError(
            f"A prompt is a {type(prompt).__name__}, but must be a string or a list of token ids."
        )
    for i in prompt:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab:
            raise RequestError(f"Token id {i!r} is not in the vocabulary, which is 0 to {vocab - 1}.")
    return list(prompt)
