"""Owns what the bodies of POST /v1/messages and /v1/messages/count_tokens may say, as Anthropic has them.

And the chat that such a request stands for: its blocks as messages, its fields as a chat's.
What would change an answer in a way that we lack (images, documents, tools that their servers run, an answer
that is begun by the client) is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, StringConstraints, model_validator

from tiny_llm.server import chat_bodies as chat
from tiny_llm.server import settings as caps
from tiny_llm.server.bodies import Body, Choosing, Count, JsonSchema, Name, ResponseFormat, Stops
from tiny_llm.server.neutral import REQUEST, misplaced, with_neutral

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


_as_texts = BeforeValidator(_blocks, json_schema_input_type=str | list[TextBlock])
Texts = Annotated[chat.MessageList[TextBlock], _as_texts]


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
    caller: chat.Untold = None


class ToolResultBlock(_Block):
    """What such a call returned, or the error that it ended with."""

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Texts = Field(default_factory=list)
    is_error: bool = False


AnyBlock = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock
Block = Annotated[AnyBlock, Field(discriminator="type")]
_as_blocks = BeforeValidator(_blocks, json_schema_input_type=str | list[AnyBlock])
Blocks = Annotated[chat.MessageList[Block], _as_blocks]
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
    tools: chat.ToolList[CustomTool] = Field(default_factory=list)
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig = Field(default_factory=OutputConfig)
    cache_control: CacheControl | None = None
    chat_template_kwargs: chat.TemplateArguments = Field(default_factory=chat.TemplateArguments)

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


_CHOICES: Mapping[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
_EFFORTS: Mapping[str, Any] = {"max": "xhigh", "high": None}
"""Efforts with another name; "high" is what this interface has where nothing is asked for."""


def chat_of(body: CountBody) -> chat.ChatBody:
    """The chat that a request stands for. What it is made of has been checked, so it is not checked again."""
    choice, effort, form = body.tool_choice, body.output_config.effort, body.output_config.format
    fields: dict[str, Any] = {}
    if isinstance(body, MessageBody):
        fields = {name: getattr(body, name) for name in Choosing.model_fields if name not in REQUEST}
        fields |= {"max_tokens": body.max_tokens, "stop": [*body.stop, *body.stop_sequences]}
    return chat.ChatBody.model_construct(
        **fields,
        messages=_messages(body),
        tools=[_tool(tool) for tool in body.tools],
        tool_choice=choice and _choice(choice),
        parallel_tool_calls=choice is None or not choice.disable_parallel_tool_use,
        response_format=form and _form(form),
        reasoning_effort=_EFFORTS.get(effort, effort) if effort else None,
        chat_template_kwargs=_template_arguments(body),
    )


def _tool(tool: CustomTool) -> chat.Tool:
    function = chat.Function.model_construct(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return chat.Tool.model_construct(type="function", function=function)


def _choice(choice: Choice) -> Any:
    if choice.name is None:
        return _CHOICES[choice.type]
    function = chat.NamedFunction.model_construct(name=choice.name)
    return chat.NamedTool.model_construct(type="function", function=function)


def _form(form: OutputFormat) -> ResponseFormat:
    schema = JsonSchema.model_construct(name="answer", schema_=form.schema_)
    return ResponseFormat.model_construct(type="json_schema", json_schema=schema)


def _template_arguments(body: CountBody) -> chat.TemplateArguments:
    given = body.chat_template_kwargs
    if body.thinking is None or body.thinking.type == "adaptive":  # the model decides
        return given
    return given.model_copy(update={"enable_thinking": body.thinking.type == "enabled"})


def _messages(body: CountBody) -> list[chat.Message]:
    """Blocks as messages; turns of one role that follow each other are one, as they are there."""
    messages: list[chat.Message] = []
    if body.system:
        messages.append(chat.Message(role="system", content=_text(body.system)))
    for turn in body.messages:
        if turn.role == "assistant":
            _add_answer(messages, turn)
        else:
            _add_said(messages, turn)
    return messages


def _add_said(messages: list[chat.Message], turn: MessageTurn) -> None:
    """What a user or the system says, and what calls returned, in their order."""
    assert turn.role != "assistant"
    for block in turn.content:
        if isinstance(block, ToolResultBlock):
            text = f"Error: {_text(block.content)}" if block.is_error else _text(block.content)
            messages.append(chat.Message(role="tool", content=text, tool_call_id=block.tool_use_id))
        elif isinstance(block, TextBlock):
            last = messages[-1] if messages else None
            if last is not None and last.role == turn.role:
                last.content = f"{last.content}\n{block.text}"
            else:
                messages.append(chat.Message(role=turn.role, content=block.text))


def _add_answer(messages: list[chat.Message], turn: MessageTurn) -> None:
    """An earlier answer: thoughts, text and calls are one message."""
    if not messages or messages[-1].role != "assistant":
        messages.append(chat.Message(role="assistant"))
    last = messages[-1]
    for block in turn.content:
        if isinstance(block, TextBlock):
            last.content = _joined(last.content, block.text)
        elif isinstance(block, ThinkingBlock):
            last.reasoning_content = _joined(last.reasoning_content, block.thinking)
        elif isinstance(block, ToolUseBlock):
            arguments = json.dumps(block.input, ensure_ascii=False)
            function = chat.CalledFunction(name=block.name, arguments=arguments)
            last.tool_calls = [*last.tool_calls, chat.PastToolCall(id=block.id, function=function)]


def _text(blocks: list[TextBlock]) -> str:
    return "\n".join(block.text for block in blocks)


def _joined(before: str | None, text: str) -> str:
    return text if before is None else f"{before}\n{text}"
