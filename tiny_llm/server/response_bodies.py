"""Owns what the body of POST /v1/responses may say, and the chat that it stands for.

Its items become messages, its fields a chat's.
What counts on more than responses that are kept for a while is refused by its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, StringConstraints

from tiny_llm.server import chat_bodies as chat
from tiny_llm.server import settings as caps
from tiny_llm.server.bodies import Body, Choosing, Count, Few, JsonSchema, Name, ResponseFormat
from tiny_llm.server.neutral import REASONING_OPTIONS, REQUEST, STREAM_OPTIONS, TEXT_OPTIONS, with_neutral

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
    content: chat.Text
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
    output: chat.Text


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


class FunctionTool(chat.Function, chat.OfFunctions):
    """A function that the model may call, as this interface writes it: all in one object."""


class ChosenTool(chat.NamedFunction, chat.OfFunctions):
    """The function that is to be called."""


@with_neutral(REASONING_OPTIONS)
class ReasoningOptions(Body):
    """About what the model thinks. It is told whole, so there is no summary of it."""

    effort: chat.Effort | None = None


@with_neutral(STREAM_OPTIONS)
class EventOptions(Body):
    """What a stream says beside the answer: nothing, so far."""


class ResponseBody(Choosing):
    """POST /v1/responses. With ``store``, another one can go on from it by ``previous_response_id``."""

    input: Items
    previous_response_id: ItemId | None = None
    store: bool = True
    instructions: str | None = None
    tools: chat.ToolList[FunctionTool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = "auto"
    parallel_tool_calls: bool = True
    reasoning: ReasoningOptions | None = None
    text: TextOptions = Field(default_factory=TextOptions)
    max_output_tokens: Count | None = None
    include: Annotated[list[Included], Field(max_length=8)] = Field(default_factory=list)
    top_logprobs: Few | None = None
    stream_options: EventOptions | None = None
    chat_template_kwargs: chat.TemplateArguments = Field(default_factory=chat.TemplateArguments)


def chat_of(body: ResponseBody) -> chat.ChatBody:
    """The chat that a request stands for. What it is made of has been checked, so it is not checked again."""
    common = {name: getattr(body, name) for name in Choosing.model_fields if name not in REQUEST}
    return chat.ChatBody.model_construct(
        **common,
        messages=_messages(body),
        tools=[chat.Tool.model_construct(type="function", function=tool) for tool in body.tools],
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=body.text.format and _format(body.text.format),
        max_completion_tokens=body.max_output_tokens,
        logprobs=LOGPROBS in body.include,
        top_logprobs=body.top_logprobs,
        reasoning_effort=body.reasoning and body.reasoning.effort,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def _choice(asked: str | ChosenTool) -> str | chat.NamedTool:
    if isinstance(asked, str):
        return asked
    return chat.NamedTool.model_construct(type="function", function=asked)


def _format(asked: TextFormat) -> ResponseFormat:
    schema = None if asked.schema_ is None else JsonSchema.model_construct(schema_=asked.schema_)
    return ResponseFormat.model_construct(type=asked.type, json_schema=schema)


def _messages(body: ResponseBody) -> list[chat.Message]:
    """Items as messages: calls, and the reasoning before them, are parts of the assistant's message."""
    messages: list[chat.Message] = []
    said, system = body.input, body.instructions
    if system is not None:
        first = said[0]
        if isinstance(first, Said) and first.role in ("system", "developer"):
            said, system = said[1:], f"{system}\n\n{first.content}"  # templates take one such message
        messages.append(chat.Message(role="system", content=system))
    for item in said:
        if isinstance(item, Returned):
            messages.append(chat.Message(role="tool", content=item.output, tool_call_id=item.call_id))
        elif isinstance(item, Said) and item.role != "assistant":
            messages.append(chat.Message(role=item.role, content=item.content))
        else:
            _add(messages, item)
    return messages


def _add(messages: list[chat.Message], item: Said | Called | Thoughts) -> None:
    """Add to the assistant's message, which ends with its calls."""
    if not messages or _is_complete(messages[-1], item):
        messages.append(chat.Message(role="assistant"))
    last = messages[-1]
    if isinstance(item, Said):
        last.content = item.content
    elif isinstance(item, Thoughts):
        last.reasoning_content = "\n".join(thought.text for thought in item.content or item.summary)
    else:
        function = chat.CalledFunction(name=item.name, arguments=item.arguments)
        last.tool_calls = [*last.tool_calls, chat.PastToolCall(id=item.call_id, function=function)]


def _is_complete(last: chat.Message, item: Said | Called | Thoughts) -> bool:
    """Whether ``item`` belongs to a message of its own: one has thoughts, then text, then calls."""
    if last.role != "assistant" or isinstance(item, Thoughts):
        return True
    if isinstance(item, Called):
        return False
    return last.content is not None or bool(last.tool_calls)
