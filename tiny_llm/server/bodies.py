"""Owns what a request's body may say: names, types, ranges. Anything else is refused by its name.

Strict: "1" is no number and 1 no text. Counts have caps, so that no body asks for endless work.
What needs the model to be checked (token ids, the context) is checked where it is used.
A sampling option that OpenAI lacks, or has as we do, comes from where ``SamplingParams`` declares it.
"""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from tiny_llm.engine.contexts import Joined
from tiny_llm.sampling_params import MOST, OPTIONS
from tiny_llm.scheduler.settings import MAX_PRIORITY
from tiny_llm.server import settings as caps
from tiny_llm.server.neutral import REQUEST, STREAM_OPTIONS, misplaced, with_fields, with_neutral

AnyBody = TypeVar("AnyBody", bound="Body")
TokenId = Annotated[int, Field(ge=0, lt=MOST)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=caps.MAX_STOP_LENGTH)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Count = Annotated[int, Field(ge=1, lt=MOST)]
ContextName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Salt = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Priority = Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
Few = Annotated[int, Field(ge=0, le=caps.MAX_LOGPROBS)]


class Body(BaseModel):
    """Base of all bodies: strict, finite, and nothing beyond what is named."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        """Null is "not given", whatever the field: some clients send all that they know."""
        if isinstance(value, dict):
            if len(value) > caps.MAX_FIELDS:  # else there would be a complaint for each
                raise ValueError(f"has {len(value)} fields, but may have at most {caps.MAX_FIELDS}")
            return {name: item for name, item in value.items() if item is not None}
        return value


def _few_labels(value: object) -> object:
    if isinstance(value, dict) and len(value) > caps.MAX_LABELS:
        raise ValueError(f"has {len(value)} entries, but may have at most {caps.MAX_LABELS}")
    return value


def _bias(value: object) -> object:
    """JSON's keys are strings: {"50": -1} becomes {50: -1}."""
    if not isinstance(value, dict):
        return value
    if len(value) > caps.MAX_BIASES:
        raise ValueError(f"has {len(value)} entries, but may have at most {caps.MAX_BIASES}")
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise misplaced([key[:40]], "is no token id")
    return {int(key): bias for key, bias in value.items()}


@with_neutral(STREAM_OPTIONS)
class StreamOptions(Body):
    """What a stream says beside the answer: its usage at the end, or with every event too."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


Stops = Annotated[
    list[StopString],
    FailFast(),
    Field(max_length=caps.MAX_STOPS),
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
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

    @property
    def plain(self) -> dict[str, object]:
        """As the client wrote it."""
        named = {} if self.json_schema is None else {"json_schema": {"schema": self.json_schema.schema_}}
        return {"type": self.type, **named}


ELSEWHERE = ("max_tokens", "n", "logprobs", "prompt_logprobs")
"""Sampling options whose names or meanings differ from one way of asking to another."""


def range_of(name: str) -> Any:
    """The range of a sampling option, and its help, in pydantic's words."""
    option = OPTIONS[name]
    bounds: dict[str, Any] = {"gt": option.gt, "ge": option.ge, "le": option.le}
    finite = {name: bound for name, bound in bounds.items() if isfinite(bound)}
    return Field(description=option.help, **finite)


def _field_of(name: str) -> tuple[object, object]:
    """A sampling option's type and default, in pydantic's words."""
    option = OPTIONS[name]
    kind: Any = Annotated[option.kind, range_of(name)]
    if option.shape == "several":
        several = Annotated[list[kind], FailFast(), Field(max_length=caps.MAX_LISTED)]
        return several, Field(default_factory=list)
    return (kind | None if option.optional else kind), option.default


def with_options(body: type[AnyBody]) -> type[AnyBody]:
    """``body``, and a field for each sampling option that it does not spell in OpenAI's way itself."""
    spelled = {*body.model_fields, *ELSEWHERE}
    return with_fields(body, {name: _field_of(name) for name in OPTIONS if name not in spelled})


Label = Annotated[str, StringConstraints(max_length=512)]
"""What clients call something. No answer depends on it."""


@with_neutral(REQUEST)
@with_options
class Choosing(Body):
    """The fields that say how tokens are chosen and when to stop, common to all ways of asking."""

    model: str | None = None
    temperature: Annotated[float, range_of("temperature")] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=MOST), AfterValidator(lambda k: max(k, 0))] = 0
    logit_bias: Biases | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64), AfterValidator(lambda s: s % 2**64)] | None = None
    stop: Stops = Field(default_factory=list)
    stream: bool = False
    speculate: bool = True
    priority: Priority = 0
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    metadata: Annotated[dict[str, Label], BeforeValidator(_few_labels)] = Field(default_factory=dict)
    regex: Annotated[str, StringConstraints(min_length=1)] | None = None
    grammar: Annotated[str, StringConstraints(min_length=1)] | None = None
    cache_salt: Salt | None = None
    contexts: Annotated[list[ContextName], FailFast(), Field(max_length=caps.MAX_PROMPTS)] = Field(
        default_factory=list
    )
    join: Joined = "exact"
    recompute: Annotated[int, Field(ge=0, lt=MOST)] = 0

    @field_validator("stream_options", check_fields=False)
    @classmethod
    def _of_a_stream(cls, value: object, info: ValidationInfo) -> object:
        if value is not None and not info.data.get("stream"):
            raise ValueError("is of use only where stream is true")
        return value


class Sampling(Choosing):
    """These, and the fields that /v1/responses calls otherwise or does not have.

    A beam search is asked for as vLLM has it: ``n`` answers of as many beams.
    """

    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=caps.MAX_N)] = 1
    response_format: ResponseFormat | None = None
    use_beam_search: bool = False
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    early_stopping: bool | Literal["never"] = False

    @model_validator(mode="after")
    def _searches(self) -> Self:
        for name, neutral in (("length_penalty", 1), ("early_stopping", False)):
            if not self.use_beam_search and getattr(self, name) != neutral:
                raise misplaced([name], "is of use only where use_beam_search is true")
        return self
