"""Owns what the bodies of POST /v1/messages and /v1/messages/count_tokens may say, as Anthropic has them.

What would change an answer in a way that we lack (images, documents, tools that their servers run, an answer
that is begun by the client) is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, StringConstraints, model_validator

from tiny_llm.server import settings as caps
from tiny_llm.server.bodies import Body, Choosing, Count, Name, Stops
from tiny_llm.server.chat_bodies import TemplateArguments, Untold
from tiny_llm.server.neutral import misplaced, with_neutral

CallId = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Effort = Literal["low", "medium", "high", "xhigh", "max"]


class CacheControl(Body):
    """A mark up to where a prompt is to be cached. Ours all are, up to any token."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class _Block(Body):
    """What each block of a message may have beside its own fields."""

    cache_control: CacheControl | None = None


class TextBlock(_Block):
    """Some text. ``citations`` is what clients send back of an answer's, which has none."""

    type: Literal["text"]
    text: str
    citations: Annotated[list[Any], Field(max_length=0)] | None = None


def _blocks(value: object) -> object:
    """A text is a block of it."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Texts = Annotated[
    Annotated[list[TextBlock], FailFast(), Field(max_length=caps.MAX_MESSAGES)],
    BeforeValidator(_blocks, json_schema_input_type=str | list[TextBlock]),
]


class ThinkingBlock(Body):
    """An earlier answer's thoughts. No server of ours signed them, and none looks whether one did."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(_Block):
    """A call that an earlier answer made. ``caller`` is what clients send back."""

    type: Literal["tool_use"]
    id: CallId
    name: Name
    input: dict[str, Any]
    caller: Untold = None


class ToolResultBlock(_Block):
    """What such a call returned, or the error that it ended with."""

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Texts = Field(default_factory=list)
    is_error: bool = False


AnyBlock = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock
Block = Annotated[AnyBlock, Field(discriminator="type")]
Blocks = Annotated[
    Annotated[list[Block], FailFast(), Field(max_length=caps.MAX_MESSAGES)],
    BeforeValidator(_blocks, json_schema_input_type=str | list[AnyBlock]),
]
_KINDS: Mapping[str, tuple[type[Body], ...]] = {
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, ToolUseBlock),
}


class MessageTurn(Body):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Blocks

    @model_validator(mode="after")
    def _has_its_own(self) -> MessageTurn:
        """Only an assistant thinks and calls, only a user says what calls returned."""
        kinds = _KINDS.get(self.role, (TextBlock,))
        for number, block in enumerate(self.content):
            if not isinstance(block, kinds):
                what = f"is {block.type!r}, which is no part of what the {self.role} says"
                raise misplaced(["content", number, "type"], what)
        return self


class CustomTool(_Block):
    """A function that the model may call; its ``input_schema`` is that of its arguments."""

    type: Literal["custom"] = "custom"
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    eager_input_streaming: bool | None = None  # ours always come as they are made


class Choice(Body):
    """Whether the model is to call something, and what."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _names_a_tool(self) -> Choice:
        if (self.name is None) == (self.type == "tool"):
            raise misplaced(["name"], "is given where type is 'tool', and only there")
        return self


class Thinking(Body):
    """Whether the model is to think first. What it thinks has no bound of its own: max_tokens is of all."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: Literal["summarized"] | None = None  # thoughts are told whole


class OutputFormat(Body):
    """What form the answer must have."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    """About the answer."""

    effort: Effort | None = None
    format: OutputFormat | None = None


class CountBody(Body):
    """POST /v1/messages/count_tokens: what a prompt is made of."""

    model: str | None = None
    messages: Annotated[list[MessageTurn], FailFast(), Field(min_length=1, max_length=caps.MAX_MESSAGES)]
    system: Texts = Field(default_factory=list)
    tools: Annotated[list[CustomTool], FailFast(), Field(max_length=caps.MAX_TOOLS)] = Field(
        default_factory=list
    )
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig = Field(default_factory=OutputConfig)
    cache_control: CacheControl | None = None
    chat_template_kwargs: TemplateArguments = Field(default_factory=TemplateArguments)

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> CountBody:
        if self.messages[-1].role == "assistant":
            what = "is the assistant's; an answer that the client begins is not supported here"
            raise misplaced(["messages", len(self.messages) - 1, "role"], what, code="unsupported_field")
        return self


@with_neutral({"service_tier": ("auto", "standard_only"), "speed": ("standard",)})
class MessageBody(CountBody, Choosing):
    """POST /v1/messages."""

    max_tokens: Count
    stop_sequences: Stops = Field(default_factory=list)
