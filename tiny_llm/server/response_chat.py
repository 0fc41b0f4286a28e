"""Owns the chat that a request to /v1/responses stands for: its items as messages, its fields as a chat's."""

from __future__ import annotations

from tiny_llm.server import chat_bodies as chat
from tiny_llm.server import response_bodies as items
from tiny_llm.server.bodies import Choosing, JsonSchema, ResponseFormat
from tiny_llm.server.neutral import REQUEST


def chat_of(body: items.ResponseBody) -> chat.ChatBody:
    """The same request as a chat. What it is made of has been checked, so it is not checked again."""
    common = {name: getattr(body, name) for name in Choosing.model_fields if name not in REQUEST}
    return chat.ChatBody.model_construct(
        **common,
        messages=_messages(body),
        tools=[chat.Tool.model_construct(type="function", function=tool) for tool in body.tools],
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=body.text.format and _format(body.text.format),
        max_completion_tokens=body.max_output_tokens,
        logprobs=items.LOGPROBS in body.include,
        top_logprobs=body.top_logprobs,
        reasoning_effort=body.reasoning and body.reasoning.effort,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def _choice(asked: str | items.ChosenTool) -> str | chat.NamedTool:
    if isinstance(asked, str):
        return asked
    return chat.NamedTool.model_construct(type="function", function=asked)


def _format(asked: items.TextFormat) -> ResponseFormat:
    schema = None if asked.schema_ is None else JsonSchema.model_construct(schema_=asked.schema_)
    return ResponseFormat.model_construct(type=asked.type, json_schema=schema)


def _messages(body: items.ResponseBody) -> list[chat.Message]:
    """Items as messages: calls, and the reasoning before them, are parts of the assistant's message."""
    messages: list[chat.Message] = []
    said, system = body.input, body.instructions
    if system is not None:
        first = said[0]
        if isinstance(first, items.Said) and first.role in ("system", "developer"):
            said, system = said[1:], f"{system}\n\n{first.content}"  # templates take one such message
        messages.append(chat.Message(role="system", content=system))
    for item in said:
        if isinstance(item, items.Returned):
            messages.append(chat.Message(role="tool", content=item.output, tool_call_id=item.call_id))
        elif isinstance(item, items.Said) and item.role != "assistant":
            messages.append(chat.Message(role=item.role, content=item.content))
        else:
            _add(messages, item)
    return messages


def _add(messages: list[chat.Message], item: items.Said | items.Called | items.Thoughts) -> None:
    """Add to the assistant's message, which ends with its calls."""
    if not messages or _is_complete(messages[-1], item):
        messages.append(chat.Message(role="assistant"))
    last = messages[-1]
    if isinstance(item, items.Said):
        last.content = item.content
    elif isinstance(item, items.Thoughts):
        last.reasoning_content = "\n".join(thought.text for thought in item.content or item.summary)
    else:
        function = chat.CalledFunction(name=item.name, arguments=item.arguments)
        last.tool_calls = [*last.tool_calls, chat.PastToolCall(id=item.call_id, function=function)]


def _is_complete(last: chat.Message, item: items.Said | items.Called | items.Thoughts) -> bool:
    """Whether ``item`` belongs to a message of its own: one has thoughts, then text, then calls."""
    if last.role != "assistant" or isinstance(item, items.Thoughts):
        return True
    if isinstance(item, items.Called):
        return False
    return last.content is not None or bool(last.tool_calls)
