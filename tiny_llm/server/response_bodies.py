"""Owns what the body of POST /v1/responses may say, and the chat that it stands for.

Nothing is kept between two requests: a field that counts on that is refused by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, StringConstraints

from tiny_llm.server import settings as caps
from tiny_llm.server.bodies import Body, Choosing, Count, Few, JsonSchema, Name, ResponseFormat
from tiny_llm.server.chat_bodies import (
    CalledFunction,
    ChatBody,
    Function,
    Message,
    NamedFunction,
    NamedTool,
    PastToolCall,
    TemplateArguments,
    Text,
    Tool,
)

LOGPROBS = "message.output_text.logprobs"
ItemId = Annotated[str, StringConstraints(max_length=128)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class Said(Body):
    """A message: one that is asked, or that an earlier answer was."""

    type: Literal["message"] = "message"
    id: ItemId | None = None
    status: ItemStatus | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class Called(Body):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    id: ItemId | None = None
    status: ItemStatus | None = None
    call_id: ItemId
    name: Name
    arguments: str


class Returned(Body):
    """What such a call returned."""

    type: Literal["function_call_output"]
    id: ItemId | None = None
    status: ItemStatus | None = None
    call_id: ItemId
    output: Text


class Thought(Body):
    """A part of an earlier answer's reasoning."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class Thoughts(Body):
    """An earlier answer's reasoning."""

    type: Literal["reasoning"]
    id: ItemId | None = None
    status: ItemStatus | None = None
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


class TextOptions(Body):
    """About the answer's text."""

    format: TextFormat | None = None


class FunctionTool(Body):
    """A function that the model may call, as this interface writes it: all in one object."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenTool(Body):
    """The function that is to be called."""

    type: Literal["function"]
    name: Name


class EventOptions(Body):
    """What a stream says beside the answer: nothing to hide its length."""

    include_obfuscation: Literal[False] = False


MetadataText = Annotated[str, StringConstraints(max_length=512)]


class ResponseBody(Choosing):
    """POST /v1/responses. ``store``, ``background`` and ``truncation`` may only say what is done anyway."""

    input: Items
    instructions: str | None = None
    tools: Annotated[list[FunctionTool], FailFast(), Field(max_length=caps.MAX_TOOLS)] = Field(
        default_factory=list
    )
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = Field(default_factory=TextOptions)
    max_output_tokens: Count | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=1)] = Field(
        default_factory=list
    )
    top_logprobs: Few | None = None
    stream_options: EventOptions | None = None
    metadata: Annotated[dict[str, MetadataText], Field(max_length=16)] = Field(default_factory=dict)
    store: Literal[False] = False
    background: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
    chat_template_kwargs: TemplateArguments = Field(default_factory=TemplateArguments)


def chat_of(body: ResponseBody) -> ChatBody:
    """The same request as a chat. What it is made of has been checked, so it is not checked again."""
    common = {name: getattr(body, name) for name in Choosing.model_fields}
    choice = body.tool_choice
    if isinstance(choice, ChosenTool):
        choice = NamedTool(type="function", function=NamedFunction(name=choice.name))  # type: ignore[assignment]
    functions = [Function.model_construct(**tool.model_dump(exclude={"type"})) for tool in body.tools]
    wanted = LOGPROBS in body.include
    return ChatBody.model_construct(
        **common,
        messages=_messages(body),
        tools=[Tool.model_construct(type="function", function=one) for one in functions],
        tool_choice=choice if body.tools or choice != "auto" else None,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body.text.format),
        max_completion_tokens=body.max_output_tokens,
        logprobs=wanted,
        top_logprobs=(body.top_logprobs or 0) if wanted else body.top_logprobs,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def _format(asked: TextFormat | None) -> ResponseFormat | None:
    if asked is None:
        return None
    schema = None
    if asked.schema_ is not None:
        schema = JsonSchema.model_construct(name=asked.name or "answer", schema_=asked.schema_)
    return ResponseFormat.model_construct(type=asked.type, json_schema=schema)


def _messages(body: ResponseBody) -> list[Message]:
    """Items as messages: calls, and the reasoning before them, are parts of the assistant's message."""
    messages: list[Message] = []
    if body.instructions is not None:
        messages.append(Message(role="system", content=body.instructions))
    for number, item in enumerate(body.input):
        if isinstance(item, Said) and item.role in ("system", "developer") and not number and messages:
            joined = f"{messages[0].content}\n\n{item.content}"  # templates take one such message
            messages[0] = Message(role="system", content=joined)
        elif isinstance(item, Returned):
            messages.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
        elif isinstance(item, Said) and item.role != "assistant":
            messages.append(Message(role=item.role, content=item.content))
        else:
            _add(messages, item)
    return messages


def _add(messages: list[Message], item: Said | Called | Thoughts) -> None:
    """Add to the assistant's message, which ends with its calls."""
    if not messages or _is_complete(messages[-1], item):
        messages.append(Message(role="assistant"))
    last = messages[-1]
    if isinstance(item, Said):
        last.content = item.content
    elif isinstance(item, Thoughts):
        last.reasoning_content = _joined(item.content or item.summary)
    else:
        function = CalledFunction(name=item.name, arguments=item.arguments)
        last.tool_calls = [*last.tool_calls, PastToolCall(id=item.call_id, function=function)]


def _is_complete(last: Message, item: Said | Called | Thoughts) -> bool:
    """Whether ``item`` belongs to a message of its own: one has thoughts, then text, then calls."""
    if last.role != "assistant" or isinstance(item, Thoughts):
        return True
    if isinstance(item, Called):
        return False
    return last.content is not None or bool(last.tool_calls)


def _joined(thoughts: Sequence[Thought]) -> str:
    return "\n".join(thought.text for thought in thoughts)
