"""Owns what a prompt may be in a body, and the fields of the routes that take text and ids as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, FailFast, Field, WithJsonSchema

from tiny_llm.server import settings as caps
from tiny_llm.server.bodies import Body, Few, Sampling, TokenId, range_of
from tiny_llm.server.chat_bodies import Message, TemplateArguments


def _prompt(value: object) -> object:
    """Text, token ids, or a list of either: list[str] | list[list[int]]. Looked at once, by hand."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of token ids, or a list of either, and not empty")
    if type(value[0]) is int:
        value = [value]
    if len(value) > caps.MAX_PROMPTS:
        raise ValueError(f"has {len(value)} prompts, but may have at most {caps.MAX_PROMPTS}")
    kind = type(value[0])
    for number, one in enumerate(value):
        if type(one) is not kind or kind not in (str, list):
            raise ValueError(f"[{number}] is a {type(one).__name__}: all must be strings, or lists of ids")
        if kind is list and not all(type(token) is int for token in one):
            raise ValueError(f"[{number}] has something else than whole numbers among its token ids")
    return value


_PROMPT_SCHEMA: Mapping[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}, "minItems": 1},
    ]
}
Prompts = Annotated[Any, AfterValidator(_prompt), WithJsonSchema(dict(_PROMPT_SCHEMA))]


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: Prompts
    echo: bool = False
    logprobs: Few | None = None


class GenerateBody(Sampling):
    """POST /generate: one prompt, and SamplingParams by their own names. Greedy by default."""

    prompt: Prompts
    temperature: Annotated[float, range_of("temperature")] = 0.0
    logprobs: Few | None = None


class TokenizeBody(Body):
    """POST /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], FailFast(), Field(max_length=caps.MAX_MESSAGES)] = Field(
        default_factory=list
    )
    add_special_tokens: bool = True
    chat_template_kwargs: TemplateArguments = Field(default_factory=TemplateArguments)


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], FailFast(), Field(max_length=2**20)]
    skip_special_tokens: bool = False
