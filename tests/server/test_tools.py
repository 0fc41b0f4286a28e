"""Tool calls: read from any cut of a text, made by the bundled model, demanded by a grammar."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tiny_llm.server.tools import Reader, Style, message_of, style_of

if TYPE_CHECKING:
    import httpx2 as httpx
    import openai

CHAT = "/v1/chat/completions"
CALCULATOR = {
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
LOOKUP = {
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
ONE = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call> {\\"", "b": [1, {}]}}\n</tool_call>'
TWO = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
ODD = '<tool_call>{"arguments": {"x": 1}, "name": "h"}</tool_call>'
BARE = '{"name": "f", "parameters": {"a": "b; }"}}; {"name": "g", "parameters": {}}'
ARGUMENTS = '{"a": "</tool_call> {\\"", "b": [1, {}]}'
CASES: list[tuple[Style | None, str, str | None, str | None, list[tuple[str, str]]]] = [
    ("tags", "Just text, 1 < 2.", "Just text, 1 < 2.", None, []),
    ("tags", ONE, None, None, [("f", ARGUMENTS)]),
    ("tags", f"Let me see.\n{ONE}\n{TWO}\n", "Let me see.", None, [("f", ARGUMENTS), ("g", "{}")]),
    ("tags", ODD, None, None, [("h", '{"x": 1}')]),
    ("tags", "<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", None, []),
    ("tags", "<tool_call>never closed", "<tool_call>never closed", None, []),
    ("tags", ONE[:40], None, None, [("f", ONE[40 - 3 : 40] and ARGUMENTS[: 40 - ONE.index('{"a"')])]),
    ("tags", f"<think>\nHm. <tool_call>\n</think>\n\n{TWO}", None, "Hm. <tool_call>\n", [("g", "{}")]),
    ("tags", "<think>never ends", "", "never ends", []),
    (None, f"<think>a</think>b {TWO}", f"b {TWO}", "a", []),
    (None, "<thin", "<thin", None, []),
    ("bare", BARE, None, None, [("f", '{"a": "b; }"}'), ("g", "{}")]),
    ("bare", "<|python_tag|>" + BARE, None, None, [("f", '{"a": "b; }"}'), ("g", "{}")]),
    ("bare", "A {word}.", "A {word}.", None, []),
    ("bare", '{"just": "json"}', '{"just": "json"}', None, []),
]


@pytest.mark.parametrize(("style", "text", "content", "reasoning", "calls"), CASES)
def test_every_cut_of_a_text_reads_the_same(
    style: Style | None, text: str, content: str | None, reasoning: str | None, calls: list[tuple[str, str]]
) -> None:
    for size in (1, 2, 3, 7, len(text)):
        reader = Reader(style)
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        deltas = [delta for piece in pieces for delta in reader.push(piece)] + reader.finish()
        message = message_of(deltas)
        made = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]
        assert made == calls, f"in pieces of {size}"
        assert message["content"] == content and message.get("reasoning_content") == reasoning
        assert len({call["id"] for call in message.get("tool_calls", [])}) == len(calls)


@pytest.mark.parametrize("size", [1, 3, len(BARE)])
def test_after_the_only_bare_call_that_is_wanted_nothing_more_is_told(size: int) -> None:
    reader = Reader("bare", several=False)
    pieces = [BARE[i : i + size] for i in range(0, len(BARE), size)]
    message = message_of([delta for piece in pieces for delta in reader.push(piece)] + reader.finish())
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": "b; }"}'} and message["content"] is None


def test_a_template_tells_the_style() -> None:
    assert style_of("within <tool_call></tool_call> tags") == "tags"
    assert style_of('{"name": function name, "parameters": dictionary}') == "bare"
    assert style_of("") == "tags"


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
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "a"}}]}]},
            "messages",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "function": {"name": "a", "arguments": "{"}}],
                    },
                ]
            },
            "messages",
        ),
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
