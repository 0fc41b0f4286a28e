"""Owns the chat that a request to /v1/responses stands for: its items as messages, its fields as a chat's."""

from __future__ import annotations

from collections.abc import Sequence

from tiny_llm.server.bodies import Choosing, JsonSchema, ResponseFormat
from tiny_llm.server.chat_bodies import (
    CalledFunction,
    ChatBody,
    Function,
    Message,
    NamedFunction,
    NamedTool,
    PastToolCall,
    Tool,
)
from tiny_llm.server.neutral import REQUEST
from tiny_llm.server.response_bodies import (
    LOGPROBS,
    Called,
    ChosenTool,
    ResponseBody,
    Returned,
    Said,
    TextFormat,
    Thought,
    Thoughts,
)


def chat_of(body: ResponseBody) -> ChatBody:
    """The same request as a chat. What it is made of has been checked, so it is not checked again."""
    common = {name: getattr(body, name) for name in Choosing.model_fields if name not in REQUEST}
    functions = [Function.model_construct(**tool.model_dump(exclude={"type"})) for tool in body.tools]
    with_logprobs = LOGPROBS in body.include
    return ChatBody.model_construct(
        **common,
        messages=_messages(body),
        tools=[Tool.model_construct(type="function", function=one) for one in functions],
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body.text.format),
        max_completion_tokens=body.max_output_tokens,
        logprobs=with_logprobs,
        top_logprobs=body.top_logprobs,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def _choice(asked: str | ChosenTool) -> str | NamedTool:
    if isinstance(asked, ChosenTool):
        return NamedTool(type="function", function=NamedFunction(name=asked.name))
    return asked


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
    items = body.input
    first = items[0]
    if messages and isinstance(first, Said) and first.role in ("system", "developer"):
        items = items[1:]
        joined = f"{body.instructions}\n\n{first.content}"  # templates take one such message
        messages = [Message(role="system", content=joined)]
    for item in items:
        if isinstance(item, Returned):
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
