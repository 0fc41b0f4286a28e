"""Owns what a caller may give as prompts and their params. Raises RequestError for what is neither."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from tiny_llm.engine.contexts import Joined
from tiny_llm.errors import ContextError, RequestError
from tiny_llm.messages.chat_format import ToolChoice, ToolSpec
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.tokenizer.tokenizer import Tokenizer

_MOST_LEFT_OUT = 4  # of a text, times what is left of it
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


def read_prompt(prompt: Prompt, tokenizer: Tokenizer, vocab: int, most: int, context: int) -> list[int]:
    """A prompt's ids; RequestError for what cannot be read, ContextError for more than ``most``.

    A BOS that the text writes out is not doubled by the tokenizer's own.
    """
    if isinstance(prompt, str):
        require_short(len(prompt), tokenizer, context)
        prompt, bos = tokenizer.encode(prompt), tokenizer.bos_id
        prompt = prompt[1:] if bos is not None and prompt[:2] == [bos, bos] else prompt
    ids = as_ids(prompt, vocab)  # a tokenizer may know more tokens than the model
    if not ids:
        raise RequestError("The prompt is empty; give at least one character or token.")
    if len(ids) > most:
        raise _too_long(f"{len(ids)} tokens", context)
    return ids


def require_short(characters: int, tokenizer: Tokenizer, context: int) -> None:
    """Raises ContextError for a text that cannot fit, before the work of reading it.

    Normalizing and templates leave out a little of a text, so it may be a few times as long as it can be.
    """
    most = _MOST_LEFT_OUT * context
    # Where it is short whatever the tokens' lengths, that is not looked for.
    if characters > most and characters > most * tokenizer.longest_token:
        raise _too_long(f"{characters} characters", context)


def _too_long(size: str, context: int) -> ContextError:
    """The context's limit, in words by which clients (litellm, LangChain) know this error."""
    return ContextError(
        f"The prompt is too long: it has {size}, and this model's maximum context length is {context} "
        "tokens, the answer included; shorten the prompt."
    )
