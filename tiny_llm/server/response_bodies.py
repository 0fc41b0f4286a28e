"""Owns what the body of POST /v1/responses may say.

What counts on more than responses that are kept for a while is refused by its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, StringConstraints

from tiny_llm.server import settings as caps
from tiny_llm.server.bodies import Body, Choosing, Count, Few, Name
from tiny_llm.server.chat_bodies import Effort, Function, NamedFunction, OfFunctions, TemplateArguments, Text
from tiny_llm.server.neutral import REASONING_OPTIONS, STREAM_OPTIONS, TEXT_OPTIONS, with_neutral

LOGPROBS = "message.output_text.logprobs"
Included = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
"""The second asks for nothing: our items of reasoning are whole, and nothing of them is kept here."""
ItemId = Annotated[str, StringConstraints(max_length=128)]


class _PastItem(Body):
    """What items have that an answer sent, and no template shows."""

    id: ItemId | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class Said(_PastItem):
    """A message: one that is asked, or that an earlier answer was. No template shows its ``phase``."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    phase: Literal["commentary", "final_answer"] | None = None


class Called(_PastItem):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: ItemId
    name: Name
    arguments: str = ""
    parsed_arguments: Any = None  # what clients make of them, and send back


class Returned(_PastItem):
    """What such a call returned."""

    type: Literal["function_call_output"]
    call_id: ItemId
    output: Text


class Thought(Body):
    """A part of an earlier answer's reasoning."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class Thoughts(_PastItem):
    """An earlier answer's reasoning."""

    type: Literal["reasoning"]
    summary: Annotated[list[Thought], FailFast(), Field(max_length=64)] = Field(default_factory=list)
    content: Annotated[list[Thought], FailFast(), Field(max_length=64)] = Field(default_factory=list)


def _items(value: object) -> object:
    """A text is a message of the user; an item that says no type is a message."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        return value
    return [{"type": "message", **item} if isinstance(item, dict) else item for item in value]


AnyItem = Said | Called | Returned | Thoughts
Item = Annotated[AnyItem, Field(discriminator="type")]
ItemList = Annotated[list[Item], FailFast(), Field(min_length=1, max_length=caps.MAX_MESSAGES)]
Items = Annotated[ItemList, BeforeValidator(_items, json_schema_input_type=str | list[AnyItem])]


class TextFormat(Body):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


@with_neutral(TEXT_OPTIONS)
class TextOptions(Body):
    """About the answer's text."""

    format: TextFormat | None = None


class FunctionTool(Function, OfFunctions):
    """A function that the model may call, as this interface writes it: all in one object."""


class ChosenTool(NamedFunction, OfFunctions):
    """The function that is to be called."""


@with_neutral(REASONING_OPTIONS)
class ReasoningOptions(Body):
    """About what the model thinks. It is told whole, so there is no summary of it."""

    effort: Effort | None = None


@with_neutral(STREAM_OPTIONS)
class EventOptions(Body):
    """What a stream says beside the answer: nothing, so far."""


class ResponseBody(Choosing):
    """POST /v1/responses. With ``store``, another one can go on from it by ``previous_response_id``."""

    input: Items
    previous_response_id: ItemId | None = None
    store: bool = True
    instructions: str | None = None
    tools: Annotated[list[FunctionTool], FailFast(), Field(max_length=caps.MAX_TOOLS)] = Field(
        default_factory=list
    )
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = "auto"
    parallel_tool_calls: bool = True
    reasoning: ReasoningOptions | None = None
    text: TextOptions = Field(default_factory=TextOptions)
    max_output_tokens: Count | None = None
    include: Annotated[list[Included], Field(max_length=8)] = Field(default_factory=list)
    top_logprobs: Few | None = None
    stream_options: EventOptions | None = None
    chat_template_kwargs: TemplateArguments = Field(default_factory=TemplateArguments)
