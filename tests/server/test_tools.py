"""Tool calls over HTTP: made by the bundled model, demanded by a grammar."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
import pytest

from tiny_llm import LLM, SamplingParams

if TYPE_CHECKING:
    import httpx2 as httpx
    import openai

CHAT = "/v1/chat/completions"
CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Compute an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "For example 12 * 7."}},
            "required": ["expression"],
        },
    },
}
LOOKUP: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look up a fact.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "What to look up."}},
            "required": ["query"],
        },
    },
}


def calculate(expression: str) -> str:
    a, operator, b = expression.split()
    return str({"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator])


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_loop_ends_with_the_right_number(client: openai.OpenAI, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is 123 + 456?"}]
    asked = {"model": "demo", "tools": [CALCULATOR, LOOKUP], "temperature": 0}
    if stream:
        with client.chat.completions.stream(messages=messages, **asked) as events:
            answer = events.get_final_completion()
    else:
        answer = client.chat.completions.create(messages=messages, **asked)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    assert choice.message.tool_calls is not None
    call = choice.message.tool_calls[0]
    assert call.type == "function" and call.function.name == "calculator"
    result = calculate(json.loads(call.function.arguments)["expression"])
    said = {"role": "assistant", "tool_calls": [call.model_dump(include={"id", "type", "function"})]}
    messages += [said, {"role": "tool", "tool_call_id": call.id, "content": result}]
    final = client.chat.completions.create(messages=messages, **asked).choices[0]
    assert final.finish_reason == "stop" and "579" in (final.message.content or "")


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "lookup"}}])
@pytest.mark.parametrize("temperature", [0, 3])
def test_a_call_that_is_demanded_is_made(http: httpx.Client, choice: Any, temperature: float) -> None:
    body = {
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "tools": [CALCULATOR, LOOKUP],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": temperature,
        "seed": 3,
        "n": 4,
        "max_tokens": 500,
    }
    answer = http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    ended = [c for c in answer.json()["choices"] if c["finish_reason"] != "length"]
    assert len(ended) >= 3
    for one in ended:
        assert one["finish_reason"] == "tool_calls" and one["message"]["content"] is None
        (call,) = one["message"]["tool_calls"]
        assert call["function"]["name"] in (["calculator", "lookup"] if choice == "required" else ["lookup"])
        assert isinstance(json.loads(call["function"]["arguments"]), dict)


class Item(pydantic.BaseModel, extra="forbid"):
    """One of an order's."""

    count: Annotated[int, pydantic.Field(ge=0, le=99)]


class Order(pydantic.BaseModel, extra="forbid"):
    """Nested: its schema has $defs, and $refs to them."""

    first: Item
    items: Annotated[list[Item], pydantic.Field(max_length=2)]


class Tree(pydantic.BaseModel, extra="forbid"):
    """Recursive."""

    leaf: bool
    inner: Tree | None


@pytest.mark.parametrize("model", [Order, Tree])
@pytest.mark.parametrize("named", [False, True])
def test_a_tool_with_nested_models_can_be_demanded(
    http: httpx.Client, model: type[pydantic.BaseModel], named: bool
) -> None:
    tools = [
        {"type": "function", "function": {"name": one.__name__, "parameters": one.model_json_schema()}}
        for one in (Order, Tree)
    ]
    choice = {"type": "function", "function": {"name": model.__name__}} if named else "required"
    ask = {"messages": [{"role": "user", "content": "Order."}], "temperature": 3, "seed": 5, "n": 4}
    answer = http.post(CHAT, json={**ask, "tools": tools, "tool_choice": choice, "max_tokens": 300})
    assert answer.status_code == 200, answer.text
    ended = [c for c in answer.json()["choices"] if c["finish_reason"] == "tool_calls"]
    assert ended, "all were cut off"
    for one in ended:
        for call in one["message"]["tool_calls"]:
            made = Order if call["function"]["name"] == "Order" else Tree
            made.model_validate_json(call["function"]["arguments"])


def test_a_function_without_parameters_takes_none(http: httpx.Client) -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    ask = {"messages": [{"role": "user", "content": "When?"}], "temperature": 3, "seed": 1, "n": 3}
    choices = http.post(CHAT, json={**ask, "tools": tools, "tool_choice": "required"}).json()["choices"]
    assert {call["function"]["arguments"] for c in choices for call in c["message"]["tool_calls"]} == {"{}"}


@pytest.mark.parametrize("parallel", [True, False])
def test_a_strict_function_is_called_by_its_schema_though_no_call_is_demanded(
    http: httpx.Client, parallel: bool
) -> None:
    """The bundled model calls a calculator by an expression; here its schema has numbers instead."""
    numbers = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "maxItems": 2.0}
    schema = {
        "type": "object",
        "properties": {"numbers": numbers},
        "required": ["numbers"],
        "additionalProperties": False,
    }
    function = {**CALCULATOR["function"], "parameters": schema, "strict": True}
    tools = [{"type": "function", "function": function}, LOOKUP]
    ask = {"temperature": 0, "max_tokens": 80, "tools": tools, "parallel_tool_calls": parallel}
    asked = {**ask, "messages": [{"role": "user", "content": "What is 123 + 456?"}]}
    choice = http.post(CHAT, json=asked).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls", choice
    for call in choice["message"]["tool_calls"]:
        assert call["function"]["name"] == "calculator"
        assert [*json.loads(call["function"]["arguments"])] == ["numbers"]
    free = http.post(CHAT, json={**ask, "messages": [{"role": "user", "content": "Hello!"}]}).json()
    assert free["choices"][0]["message"]["content"], "text is free"


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize(
    ("schema", "told"),
    [({"type": 123}, "type"), ({"properties": {"a": {"$ref": "#/$defs/nowhere"}}}, "/$defs/nowhere")],
)
def test_parameters_that_are_no_schema_are_refused_in_any_mode(
    http: httpx.Client, choice: str, schema: dict[str, Any], told: str
) -> None:
    tools = [LOOKUP, {"type": "function", "function": {"name": "f", "parameters": schema}}]
    body = {"messages": [{"role": "user", "content": "a"}], "tools": tools, "tool_choice": choice}
    answer = http.post(CHAT, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "tools[1].function.parameters"
    assert told in answer.json()["error"]["message"]


def test_a_schema_that_only_a_form_could_not_keep_is_no_fault_of_a_tools(http: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}, "not": {}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    body = {"messages": [{"role": "user", "content": "a"}], "tools": tools, "max_tokens": 1}
    assert http.post(CHAT, json=body).status_code == 200


def test_a_text_format_binds_messages_and_not_calls(http: httpx.Client) -> None:
    flat = {"type": "function", **CALCULATOR["function"]}
    form = {"type": "json_schema", "name": "door", "schema": DOOR}
    ask = {"input": "What is 1 + 2?", "tools": [flat], "tool_choice": "required", "text": {"format": form}}
    answer = http.post("/v1/responses", json={**ask, "temperature": 0})
    assert answer.status_code == 200, answer.text
    assert {item["type"] for item in answer.json()["output"]} == {"function_call"}


def test_without_leave_no_call_is_made(http: httpx.Client) -> None:
    ask = {
        "messages": [{"role": "user", "content": "What is 123 + 456?"}],
        "temperature": 0,
        "max_tokens": 60,
    }
    free = http.post(CHAT, json=ask).json()["choices"][0]["message"]
    none = http.post(CHAT, json={**ask, "tools": [CALCULATOR], "tool_choice": "none"}).json()
    assert none["choices"][0]["message"] == free and "tool_calls" not in free


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [LOOKUP], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [LOOKUP], "tool_choice": "required", "regex": "a"}, "tool_choice"),
        ({"tools": [LOOKUP], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [LOOKUP] * 129}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a", "more": 1}}]}, "tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_tools_that_are_wrong_are_named(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    answer = http.post(CHAT, json={"messages": [{"role": "user", "content": "a"}], **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].split("[")[0].split(".")[0] == param


def test_a_demanded_call_with_a_bad_schema_is_refused(http: httpx.Client) -> None:
    bad = {"type": "function", "function": {"name": "a", "parameters": {"type": "object", "not": {}}}}
    body = {"messages": [{"role": "user", "content": "a"}], "tools": [bad], "tool_choice": "required"}
    error = http.post(CHAT, json=body).json()["error"]
    assert error["param"] == "tools" and "not" in error["message"]


DOOR = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green"]}},
    "required": ["color"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [CALCULATOR, LOOKUP]},
        {"tools": [CALCULATOR, LOOKUP], "tool_choice": "none"},
        {"tools": [CALCULATOR, LOOKUP], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [CALCULATOR], "tool_choice": {"type": "function", "function": {"name": "calculator"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "door", "schema": DOOR}}},
    ],
    ids=["auto", "none", "required", "named", "schema"],
)
def test_the_library_answers_as_the_server_does(
    http: httpx.Client, library: LLM, asked: dict[str, Any]
) -> None:
    messages = [{"role": "user", "content": "What is 123 + 456?"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 60, **asked}
    told = http.post(CHAT, json=body).json()["choices"][0]["message"]
    message = library.chat(messages, SamplingParams(max_tokens=60), **asked).message
    assert message is not None and told["content"] == message.content
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in told.get("tool_calls", [])]
    assert calls == [(call.name, call.arguments) for call in message.tool_calls]
    if asked.get("tool_choice", "none") != "none":
        assert calls, "it was demanded"


@pytest.fixture(scope="module")
def library() -> LLM:
    return LLM("demo")
