"""Owns the chat that a request to /v1/messages stands for: its blocks as messages, its fields as a chat's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tiny_llm.server import chat_bodies as chat
from tiny_llm.server import message_bodies as asked
from tiny_llm.server.bodies import Choosing, JsonSchema, ResponseFormat
from tiny_llm.server.neutral import REQUEST

_CHOICES: Mapping[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
_EFFORTS: Mapping[str, Any] = {"max": "xhigh", "high": None}
"""Efforts with another name; "high" is what this interface has where nothing is asked for."""


def chat_of(body: asked.CountBody) -> chat.ChatBody:
    """The same request as a chat. What it is made of has been checked, so it is not checked again."""
    choice, effort, form = body.tool_choice, body.output_config.effort, body.output_config.format
    fields: dict[str, Any] = {}
    if isinstance(body, asked.MessageBody):
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


def _tool(tool: asked.CustomTool) -> chat.Tool:
    function = chat.Function.model_construct(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return chat.Tool.model_construct(type="function", function=function)


def _choice(choice: asked.Choice) -> Any:
    if choice.name is None:
        return _CHOICES[choice.type]
    function = chat.NamedFunction.model_construct(name=choice.name)
    return chat.NamedTool.model_construct(type="function", function=function)


def _form(form: asked.OutputFormat) -> ResponseFormat:
    schema = JsonSchema.model_construct(name="answer", schema_=form.schema_)
    return ResponseFormat.model_construct(type="json_schema", json_schema=schema)


def _template_arguments(body: asked.CountBody) -> chat.TemplateArguments:
    given = body.chat_template_kwargs
    if body.thinking is None or body.thinking.type == "adaptive":  # the model decides
        return given
    return given.model_copy(update={"enable_thinking": body.thinking.type == "enabled"})


def _messages(body: asked.CountBody) -> list[chat.Message]:
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


def _add_said(messages: list[chat.Message], turn: asked.MessageTurn) -> None:
    """What a user or the system says, and what calls returned, in their order."""
    assert turn.role != "assistant"
    for block in turn.content:
        if isinstance(block, asked.ToolResultBlock):
            text = f"Error: {_text(block.content)}" if block.is_error else _text(block.content)
            messages.append(chat.Message(role="tool", content=text, tool_call_id=block.tool_use_id))
        elif isinstance(block, asked.TextBlock):
            last = messages[-1] if messages else None
            if last is not None and last.role == turn.role:
                last.content = f"{last.content}\n{block.text}"
            else:
                messages.append(chat.Message(role=turn.role, content=block.text))


def _add_answer(messages: list[chat.Message], turn: asked.MessageTurn) -> None:
    """An earlier answer: thoughts, text and calls are one message."""
    if not messages or messages[-1].role != "assistant":
        messages.append(chat.Message(role="assistant"))
    last = messages[-1]
    for block in turn.content:
        if isinstance(block, asked.TextBlock):
            last.content = _joined(last.content, block.text)
        elif isinstance(block, asked.ThinkingBlock):
            last.reasoning_content = _joined(last.reasoning_content, block.thinking)
        elif isinstance(block, asked.ToolUseBlock):
            arguments = json.dumps(block.input, ensure_ascii=False)
            function = chat.CalledFunction(name=block.name, arguments=arguments)
            last.tool_calls = [*last.tool_calls, chat.PastToolCall(id=block.id, function=function)]


def _text(blocks: list[asked.TextBlock]) -> str:
    return "\n".join(block.text for block in blocks)


def _joined(before: str | None, text: str) -> str:
    return text if before is None else f"{before}\n{text}"
