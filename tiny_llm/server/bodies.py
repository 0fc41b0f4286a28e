"""Owns what a request's body may say: names, types, ranges. Anything else is refused by its name.

Strict: "1" is no number and 1 no text. Counts have caps, so that no body asks for endless work.
What needs the model to be checked (token ids, the context) is checked where it is used.
A sampling option that OpenAI lacks, or has as we do, comes from where ``SamplingParams`` declares it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    StringConstraints,
    WithJsonSchema,
    create_model,
    model_validator,
)

from tiny_llm.sampling_params import MOST, OPTIONS
from tiny_llm.scheduler.settings import MAX_PRIORITY
from tiny_llm.server import settings as caps

AnyBody = TypeVar("AnyBody", bound="Body")
TokenId = Annotated[int, Field(ge=0, lt=MOST)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=caps.MAX_STOP_LENGTH)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Count = Annotated[int, Field(ge=1, lt=MOST)]
Few = Annotated[int, Field(ge=0, le=caps.MAX_LOGPROBS)]


class Body(BaseModel):
    """Base of all bodies: strict, finite, and nothing beyond what is named."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        """Null is "not given", whatever the field: some clients send all that they know."""
        if isinstance(value, dict):
            return {name: item for name, item in value.items() if item is not None}
        return value


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _bias(value: object) -> object:
    """JSON's keys are strings: {"50": -1} becomes {50: -1}."""
    if not isinstance(value, dict):
        return value
    if len(value) > caps.MAX_BIASES:
        raise ValueError(f"has {len(value)} entries, but may have at most {caps.MAX_BIASES}")
    for key in value:
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError(f"{str(key)[:40]!r} is no token id")
    return {int(key): bias for key, bias in value.items()}


class StreamOptions(Body):
    """What a stream says beside the answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


Stops = Annotated[
    list[StopString],
    FailFast(),
    Field(max_length=caps.MAX_STOPS),
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


Biases = Annotated[
    dict[int, Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_bias),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]


class JsonSchema(Body):
    """A form by its schema, as OpenAI nests it."""

    name: Name
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = Field(default_factory=dict)
    strict: bool | None = None


class ResponseFormat(Body):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


ELSEWHERE = ("max_tokens", "n", "logprobs", "prompt_logprobs")
"""Sampling options whose names or meanings differ from one way of asking to another."""


def _bounds(name: str) -> Any:
    """The range of a sampling option, and its help, in pydantic's words."""
    option = OPTIONS[name]
    return Field(gt=_finite(option.gt), ge=_finite(option.ge), le=_finite(option.le), description=option.help)


def _finite(bound: float) -> float | None:
    return bound if isfinite(bound) else None


def _field_of(name: str) -> tuple[object, object]:
    """A sampling option's type and default, in pydantic's words."""
    option = OPTIONS[name]
    kind: Any = Annotated[option.kind, _bounds(name)]
    if option.shape == "several":
        return Annotated[list[kind], FailFast(), Field(max_length=caps.MAX_LISTED)], Field(
            default_factory=list
        )
    return (kind | None if option.optional else kind), option.default


def with_options(body: type[AnyBody]) -> type[AnyBody]:
    """``body``, and a field for each sampling option that it does not spell in OpenAI's way itself."""
    spelled = {*body.model_fields, *ELSEWHERE}
    own: dict[str, Any] = {name: _field_of(name) for name in OPTIONS if name not in spelled}
    return create_model(body.__name__, __base__=body, __module__=body.__module__, __doc__=body.__doc__, **own)


@with_options
class Choosing(Body):
    """The fields that say how tokens are chosen and when to stop, common to all ways of asking."""

    model: str | None = None
    temperature: Annotated[float, _bounds("temperature")] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=MOST), AfterValidator(lambda k: max(k, 0))] = 0
    logit_bias: Biases | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64), AfterValidator(lambda s: s % 2**64)] | None = None
    stop: Stops = Field(default_factory=list)
    stream: bool = False
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    user: Annotated[str, StringConstraints(max_length=512)] | None = None
    regex: Annotated[str, StringConstraints(min_length=1)] | None = None
    grammar: Annotated[str, StringConstraints(min_length=1)] | None = None
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = None


class Sampling(Choosing):
    """These, and the fields that /v1/responses calls otherwise or does not have."""

    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=caps.MAX_N)] = 1
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None


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
    temperature: Annotated[float, _bounds("temperature")] = 0.0
    logprobs: Few | None = None


def _text(value: object) -> object:
    """Content as one text: parts of type "text" are joined by newlines, others are refused."""
    if not isinstance(value, list):
        return value
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text"):
            raise ValueError(f"[{number}] is of type {str(kind)[:40]!r}, but only text is supported")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"[{number}].text must be a string")
        if unknown := part.keys() - {"type", "text", "annotations", "logprobs"}:
            raise ValueError(f"[{number}].{min(unknown)} is not supported")
    return "\n".join(part["text"] for part in value)


_TEXT_SCHEMA: Mapping[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
                "additionalProperties": False,
            },
        },
    ]
}
Text = Annotated[str, BeforeValidator(_text), WithJsonSchema(dict(_TEXT_SCHEMA))]


class CalledFunction(Body):
    """A function that the model called: ``arguments`` is JSON in a string."""

    name: Name
    arguments: str


class PastToolCall(Body):
    """A call that an earlier answer made."""

    id: Annotated[str, StringConstraints(max_length=128)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # some clients send back what they streamed


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: Annotated[str, StringConstraints(max_length=64)] | None = None
    tool_calls: Annotated[list[PastToolCall], FailFast(), Field(max_length=caps.MAX_TOOLS)] = Field(
        default_factory=list
    )
    tool_call_id: Annotated[str, StringConstraints(max_length=128)] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None


Messages = Annotated[list[Message], FailFast(), Field(min_length=1, max_length=caps.MAX_MESSAGES)]


class TemplateArguments(Body):
    """The chat templates' own variables that a client may set."""

    enable_thinking: bool | None = None
    add_generation_prompt: bool | None = None


class Function(Body):
    """A function that the model may call; ``parameters`` is the schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """Something that the model may use."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """A function by its name."""

    name: Name


class NamedTool(Body):
    """The tool that is to be used."""

    type: Literal["function"]
    function: NamedFunction


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Messages
    tools: Annotated[list[Tool], FailFast(), Field(max_length=caps.MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Few | None = None
    chat_template_kwargs: TemplateArguments = Field(default_factory=TemplateArguments)


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
