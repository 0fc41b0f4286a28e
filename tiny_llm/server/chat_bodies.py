"""Owns what a conversation may be in a body: messages, tools, calls, and /v1/chat/completions' own fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, FailFast, Field, StringConstraints, model_validator

from tiny_llm.server import settings as caps
from tiny_llm.server.bodies import Body, Count, Few, Name, Sampling, StreamOptions
from tiny_llm.server.neutral import misplaced

T = TypeVar("T")
ToolList = Annotated[list[T], FailFast(), Field(max_length=caps.MAX_TOOLS)]
MessageList = Annotated[list[T], FailFast(), Field(max_length=caps.MAX_MESSAGES)]
_TEXT_KINDS = ("text", "input_text", "output_text")
_PART_FIELDS = ("type", "text", "annotations", "logprobs", "parsed")


def _text(value: object) -> object:
    """Content as one text: parts of type "text" are joined by newlines, others are refused."""
    if not isinstance(value, list):
        return value
    return "\n".join([_text_of(part, number) for number, part in enumerate(value)])


def _text_of(part: object, number: int) -> str:
    """One part's text. What clients and servers say of it beside is no part of what was said."""
    if not isinstance(part, dict):
        raise misplaced([number], "must be an object with type and text")
    kind, text = part.get("type"), part.get("text")
    if kind not in _TEXT_KINDS:
        raise misplaced([number, "type"], f"is {str(kind)[:40]!r}, but only text is supported")
    if not isinstance(text, str):
        raise misplaced([number, "text"], "must be a string")
    for name, given in part.items():
        if name not in _PART_FIELDS and given is not None:
            raise misplaced([number, name], "is not supported here", code="unsupported_field")
    return text


class TextPart(Body):
    """What is documented of a part; what is taken is ``_text_of``'s to say."""

    type: Literal["text"]
    text: str


Text = Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[TextPart])]

Untold = Annotated[Any, Field(exclude=True)]
"""What is taken from clients that send back what they were sent, and is not for the template."""


class CalledFunction(Body):
    """A function that the model called: ``arguments`` is JSON in a string, which may be cut short.

    ``parsed_arguments`` is what clients make of it, and send back; the same is said once.
    """

    name: Name
    arguments: str = ""
    parsed_arguments: Untold = None


class PastToolCall(Body):
    """A call that an earlier answer made."""

    id: Annotated[str, StringConstraints(max_length=128)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Untold = None  # some clients send back what they streamed


class Message(Body):
    """One message of a conversation.

    ``parsed`` is what clients make of an answer's content, and send back. Of other servers' ``annotations``
    no model is told.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: Annotated[str, StringConstraints(max_length=64)] | None = None
    tool_calls: ToolList[PastToolCall] = Field(default_factory=list)
    tool_call_id: Annotated[str, StringConstraints(max_length=128)] | None = None
    refusal: Annotated[str | None, Field(exclude=True)] = None
    reasoning_content: str | None = None
    parsed: Untold = None
    annotations: Untold = None

    @model_validator(mode="after")
    def _is_whole(self) -> Message:
        """Only an assistant may have said nothing, and what a tool returned is the answer to a call."""
        if self.content is None and self.role != "assistant":
            raise misplaced(["content"], f"is missing: a message of the {self.role} needs it", code="missing")
        if self.tool_call_id is None and self.role == "tool":
            what = "is missing: it says which call the tool's message answers"
            raise misplaced(["tool_call_id"], what, code="missing")
        return self


Messages = Annotated[list[Message], FailFast(), Field(min_length=1, max_length=caps.MAX_MESSAGES)]


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]  # how much a model is to think
USUAL_EFFORT: Effort = "medium"  # OpenAI's default: it asks for nothing


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


class OfFunctions(Body):
    """A tool, or the choice of one: all of them are functions."""

    type: Literal["function"]


class Tool(OfFunctions):
    """Something that the model may use."""

    function: Function


class NamedFunction(Body):
    """A function by its name."""

    name: Name


class NamedTool(OfFunctions):
    """The tool that is to be used."""

    function: NamedFunction


class Prediction(Body):
    """The answer that the client expects, say a text with a few changes: what is right comes sooner."""

    type: Literal["content"]
    content: Text


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Messages
    tools: ToolList[Tool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Few | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = None
    prediction: Prediction | None = None
    chat_template_kwargs: TemplateArguments = Field(default_factory=TemplateArguments)
