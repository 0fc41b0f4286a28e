"""Conversations sent back as clients send them: parsed messages, calls cut short, what a template lacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import openai
import pydantic
import pytest

from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.llm import LLM
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.errors import RequestError

if TYPE_CHECKING:
    import httpx2 as httpx

    from tests.server.conftest import Running

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0}
USER = {"role": "user", "content": "What is 123 + 456?"}
NAME = "calculator"
SCHEMA = {
    "type": "object",
    "properties": {"expression": {"type": "string"}},
    "required": ["expression"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": NAME, "parameters": SCHEMA, "strict": True}}


class Door(pydantic.BaseModel):
    """A form."""

    color: Literal["red", "green"]


@pytest.mark.parametrize("as_dict", [False, True], ids=["object", "model_dump"])
def test_messages_that_parse_returned_are_taken_back(client: openai.OpenAI, as_dict: bool) -> None:
    formed = client.chat.completions.parse(messages=[USER], response_format=Door, **GREEDY)
    called = client.chat.completions.parse(messages=[USER], tools=[TOOL], tool_choice="required", **GREEDY)
    message, call = formed.choices[0].message, called.choices[0].message
    assert message.parsed and call.tool_calls and call.tool_calls[0].function.parsed_arguments
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "579"}
    for history in ([message], [call, result]):
        sent: list[Any] = [m.model_dump() if as_dict and not isinstance(m, dict) else m for m in history]
        answer = client.chat.completions.create(messages=[USER, *sent, USER], max_tokens=4, **GREEDY)
        assert answer.choices[0].message.content


@pytest.mark.parametrize("as_dict", [False, True], ids=["object", "model_dump"])
def test_items_that_parse_returned_are_taken_back(client: openai.OpenAI, as_dict: bool) -> None:
    tool: Any = {"type": "function", "name": NAME, "parameters": SCHEMA, "strict": True}
    formed = client.responses.parse(input="A door?", text_format=Door, **GREEDY)
    called = client.responses.parse(input="2 + 2?", tools=[tool], tool_choice="required", **GREEDY)
    assert formed.output_parsed and called.output[0].type == "function_call"
    result = {"type": "function_call_output", "call_id": called.output[0].call_id, "output": "4"}
    for history in ([*formed.output], [*called.output, result]):
        sent: list[Any] = [i.model_dump() if as_dict and not isinstance(i, dict) else i for i in history]
        answer = client.responses.create(input=[USER, *sent, USER], max_output_tokens=4, **GREEDY)
        assert answer.output_text


def test_what_other_servers_add_to_a_message_is_taken(http: httpx.Client) -> None:
    said = {"role": "assistant", "content": "579.", "refusal": None, "annotations": [], "audio": None}
    said |= {"function_call": None, "tool_calls": None}
    whole = {"messages": [USER, said, USER], "max_tokens": 4, **GREEDY}
    plain = {**whole, "messages": [USER, {"role": "assistant", "content": "579."}, USER]}
    answers = [http.post(CHAT, json=body) for body in (whole, plain)]
    assert answers[0].status_code == 200, answers[0].text
    assert answers[0].json()["choices"] == answers[1].json()["choices"]


def test_a_call_that_the_server_cut_short_does_not_end_the_conversation(http: httpx.Client) -> None:
    asked = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 12, **GREEDY}
    message = http.post(CHAT, json={"messages": [USER], **asked}).json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(call["function"]["arguments"])
    result = {"role": "tool", "tool_call_id": call["id"], "content": "Invalid arguments."}
    body = {"messages": [USER, message, result], "tools": [TOOL], "max_tokens": 2, **GREEDY}
    answer = http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    items = [
        {"role": "user", "content": USER["content"]},
        {"type": "function_call", "call_id": "a", **call["function"]},
        {"type": "function_call_output", "call_id": "a", "output": "Invalid arguments."},
    ]
    again = http.post(RESPONSES, json={"input": items, "max_output_tokens": 2, **GREEDY})
    assert again.status_code == 200, again.text


@pytest.mark.parametrize("arguments", ["", None, "{}"])
def test_a_call_without_arguments_is_taken(http: httpx.Client, arguments: str | None) -> None:
    function = {"name": "now", "arguments": arguments}
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": function}]}
    result = {"role": "tool", "tool_call_id": "a", "content": "12:00"}
    answer = http.post(CHAT, json={"messages": [USER, called, result], "max_tokens": 2, **GREEDY})
    assert answer.status_code == 200, answer.text
    item = {"type": "function_call", "call_id": "a", "name": "now", "arguments": arguments}
    output = {"type": "function_call_output", "call_id": "a", "output": "12:00"}
    again = http.post(RESPONSES, json={"input": [USER, item, output], "max_output_tokens": 2, **GREEDY})
    assert again.status_code == 200, again.text
    used = (answer.json()["usage"]["prompt_tokens"], again.json()["usage"]["input_tokens"])
    assert used[0] == used[1] > 30


ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}<|assistant|>\n"


@pytest.fixture
def without_tools(demo_copy: Path) -> Path:
    """The bundled model with a template that knows of no tools."""
    (demo_copy / "chat_template.jinja").write_text(ZEPHYR, "utf-8")
    return demo_copy


def test_tools_that_the_template_cannot_show_are_a_400_that_names_them(
    start: Callable[..., AbstractContextManager[Running]], without_tools: Path
) -> None:
    few = EngineSettings(kv_blocks=64)
    with start(load=lambda: AsyncLLM(without_tools, engine=few)) as running, running.http() as http:
        while http.get("/health").status_code == 503:
            pass
        flat = {"type": "function", **TOOL["function"]}
        for path, body in (
            (CHAT, {"messages": [USER], "tools": [TOOL]}),
            (CHAT, {"messages": [USER], "tools": [TOOL], "tool_choice": "required"}),
            (RESPONSES, {"input": "Hi", "tools": [flat]}),
        ):
            answer = http.post(path, json={"max_tokens": 2, **body} if path == CHAT else body)
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["param"] == "tools" and error["message"].startswith("tools: this model's chat")
        function = {"name": "f", "arguments": "{}"}
        called = {"role": "assistant", "tool_calls": [{"id": "a", "function": function}]}
        answer = http.post(CHAT, json={"messages": [USER, called]})
        assert answer.status_code == 400 and "messages[1].tool_calls" in answer.json()["error"]["message"]


def test_chat_refuses_tools_that_the_template_cannot_show(without_tools: Path) -> None:
    llm = LLM(without_tools, engine=EngineSettings(kv_blocks=64))
    with pytest.raises(RequestError, match="chat template shows none") as caught:
        llm.chat("What is 1 + 2?", tools=[TOOL])
    assert caught.value.param == "tools"
