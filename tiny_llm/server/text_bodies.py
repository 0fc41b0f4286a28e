"""Owns what a prompt may be in a body, and the fields of the routes that take text and ids as they are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, model_validator

from tiny_llm.sampling_params import MOST
from tiny_llm.server import settings as caps
from tiny_llm.server.bodies import (
    Body,
    ContextName,
    Count,
    Few,
    Label,
    Priority,
    Salt,
    Sampling,
    StreamOptions,
    TokenId,
    range_of,
)
from tiny_llm.server.chat_bodies import Message, MessageList, TemplateArguments
from tiny_llm.server.neutral import misplaced


def _prompt(value: object, most: int = caps.MAX_PROMPTS) -> object:
    """Text, token ids, or a list of either: list[str] | list[list[int]]. Looked at once, by hand."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of token ids, or a list of either, and not empty")
    if type(value[0]) is int:
        _require_ids(value, ())
        return [value]
    if len(value) > most:
        raise ValueError(f"has {len(value)} texts, but may have at most {most}")
    kind = type(value[0])
    for number, one in enumerate(value):
        if type(one) is not kind or kind not in (str, list):
            what = f"is a {type(one).__name__}: all must be strings, or lists of ids"
            raise misplaced([number], what)
        if kind is list:
            _require_ids(one, (number,))
    return value


def _require_ids(prompt: list[Any], within: tuple[int, ...]) -> None:
    if not all(type(token) is int for token in prompt):
        raise misplaced(within, "has something else than whole numbers among its token ids")


_Ids = Annotated[list[int], Field(min_length=1)]
_Texts = Annotated[list[str], Field(min_length=1)]
_ListOfIds = Annotated[list[list[int]], Field(min_length=1)]
_Any = str | _Ids | _Texts | _ListOfIds
Prompts = Annotated[Any, BeforeValidator(_prompt, json_schema_input_type=_Any)]
Inputs = Annotated[
    Any, BeforeValidator(lambda value: _prompt(value, caps.MAX_INPUTS), json_schema_input_type=_Any)
]


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, lt=MOST)] | None = None
    echo: bool = False
    logprobs: Few | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _asks_for_something(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise misplaced(["max_tokens"], "may be 0 only with echo, to tell how likely the prompt is")
        return self


class GenerateBody(Sampling):
    """POST /generate: one prompt, and SamplingParams by their own names. Greedy by default."""

    prompt: Prompts
    temperature: Annotated[float, range_of("temperature")] = 0.0
    logprobs: Few | None = None


class EmbeddingBody(Body):
    """POST /v1/embeddings. Before each text of ``input`` stands the model's ``prompt`` of that name, or an
    ``instruction`` as it is."""

    model: str | None = None
    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    prompt: Label | None = None
    instruction: str | None = None
    priority: Priority = 0
    user: Label | None = None
    cache_salt: Salt | None = None


class ContextBody(Body):
    """POST /v1/contexts: a text to be kept as ``name``, for ``ttl`` seconds or until it is removed."""

    name: ContextName
    text: Annotated[str, Field(min_length=1)]
    ttl: Annotated[float, Field(gt=0)] | None = None
    cache_salt: Salt | None = None


class TokenizeBody(Body):
    """POST /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: MessageList[Message] = Field(default_factory=list)
    add_special_tokens: bool = True
    chat_template_kwargs: TemplateArguments = Field(default_factory=TemplateArguments)


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], FailFast(), Field(max_length=caps.MAX_IDS)]
    skip_special_tokens: bool = False
