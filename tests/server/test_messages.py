"""Anthropic's Messages API, by its own package: text, tools, thoughts, forms, streams, errors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anthropic
import pytest

from tiny_llm import AsyncLLM
from tiny_llm.server.message_bodies import CountBody, MessageBody, chat_of
from tiny_llm.server.settings import ServerSettings

if TYPE_CHECKING:
    import httpx2 as httpx

    from tests.server.conftest import Running

Serving = contextlib.AbstractContextManager["Running"]
PATH = "/v1/messages"
QUESTION: list[Any] = [{"role": "user", "content": "What is a KV cache?"}]
SUM: list[Any] = [{"role": "user", "content": "What is 123 + 456?"}]
RAW: dict[str, Any] = {"model": "demo", "max_tokens": 60, "temperature": 0}
ASKED: dict[str, Any] = {"model": "demo", "max_tokens": 60, "extra_body": {"temperature": 0}}
"""The package knows no temperature any more."""
CALCULATOR: dict[str, Any] = {
    "name": "calculator",
    "description": "Compute an arithmetic expression.",
    "input_schema": {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "For example 12 * 7."}},
        "required": ["expression"],
    },
}
LOOKUP: dict[str, Any] = {
    "name": "lookup",
    "description": "Look up a fact.",
    "input_schema": {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "What to look up."}},
        "required": ["query"],
    },
}


def client_of(running: Running, **options: Any) -> anthropic.Anthropic:
    given = {"api_key": "none", **options}
    return anthropic.Anthropic(
        base_url=running.url, max_retries=0, timeout=60, _strict_response_validation=True, **given
    )


@pytest.fixture
def claude(running: Running) -> Iterator[anthropic.Anthropic]:
    with client_of(running) as one:
        yield one


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_an_answer_is_the_chat_s(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    chat = http.post("/v1/chat/completions", json={"messages": QUESTION, "temperature": 0, "max_tokens": 60})
    message = claude.messages.create(messages=QUESTION, **ASKED)
    (choice,) = chat.json()["choices"]
    assert text_of(message) == choice["message"]["content"]
    assert message.stop_reason == ("end_turn" if choice["finish_reason"] == "stop" else "max_tokens")
    used, read = message.usage, chat.json()["usage"]
    assert used.output_tokens == read["completion_tokens"]
    assert used.input_tokens + (used.cache_read_input_tokens or 0) == read["prompt_tokens"]


def test_a_stream_s_events_come_in_their_order_and_add_up(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(messages=QUESTION, **ASKED)
    with claude.messages.stream(messages=QUESTION, **ASKED) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert {"content_block_delta", "text"} == set(kinds[2:-3])
    assert text_of(final) == text_of(whole) and final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_stream_ends_with_its_last_event(http: httpx.Client) -> None:
    """Others' clients read each data line as an object: there is no [DONE]."""
    told = http.post(PATH, json={**RAW, "messages": QUESTION, "stream": True}).text
    events = [part.split("\n") for part in told.removesuffix("\n\n").split("\n\n")]
    for name, data in events:
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")
    assert events[-1][0] == "event: message_stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_loop_ends_with_the_right_number(claude: anthropic.Anthropic, stream: bool) -> None:
    messages, asked = [*SUM], {**ASKED, "max_tokens": 200, "tools": [CALCULATOR, LOOKUP]}

    def answer() -> anthropic.types.Message:
        if not stream:
            return claude.messages.create(messages=messages, **asked)
        with claude.messages.stream(messages=messages, **asked) as events:
            return events.get_final_message()

    first = answer()
    assert first.stop_reason == "tool_use"
    (call,) = [block for block in first.content if block.type == "tool_use"]
    a, _, b = str(call.input["expression"]).split()
    result = {"type": "tool_result", "tool_use_id": call.id, "content": str(int(a) + int(b))}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    final = answer()
    assert final.stop_reason == "end_turn" and "579" in text_of(final)


@pytest.mark.parametrize(
    ("choice", "names"),
    [({"type": "any"}, {"calculator", "lookup"}), ({"type": "tool", "name": "lookup"}, {"lookup"})],
)
def test_a_call_that_is_demanded_is_made(
    claude: anthropic.Anthropic, choice: dict[str, Any], names: set[str]
) -> None:
    asked: dict[str, Any] = {"tool_choice": {**choice, "disable_parallel_tool_use": True}, "max_tokens": 400}
    messages: list[Any] = [{"role": "user", "content": "Tell me a story."}]
    message = claude.messages.create(messages=messages, tools=[CALCULATOR, LOOKUP], **(ASKED | asked))
    (call,) = message.content
    assert message.stop_reason == "tool_use" and call.type == "tool_use" and call.name in names


def test_no_call_is_made_where_none_may_be(claude: anthropic.Anthropic) -> None:
    none: Any = {"type": "none"}
    message = claude.messages.create(messages=SUM, tools=[CALCULATOR], tool_choice=none, **ASKED)
    assert {block.type for block in message.content} == {"text"}


def test_an_answer_has_the_form_that_is_asked_for(claude: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    }
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    message = claude.messages.create(messages=SUM, output_config=config, **ASKED)
    assert 0 <= json.loads(text_of(message))["n"] <= 99


def test_a_stop_sequence_is_named(claude: anthropic.Anthropic) -> None:
    whole = text_of(claude.messages.create(messages=QUESTION, **ASKED))
    word = whole.split()[3]
    message = claude.messages.create(messages=QUESTION, stop_sequences=["\x07", word], **ASKED)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", word)
    assert text_of(message) == whole[: whole.index(word)]


def test_an_answer_longer_than_the_context_is_cut_there(
    claude: anthropic.Anthropic, running: Running
) -> None:
    """Their clients always say how long an answer may be, and say a lot."""
    asked: dict[str, Any] = {
        **ASKED,
        "max_tokens": 10**6,
        "extra_body": {"temperature": 0, "ignore_eos": True},
    }
    message = claude.messages.create(messages=QUESTION, **asked)
    read = message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
    assert message.stop_reason == "model_context_window_exceeded"
    assert read + message.usage.output_tokens == running.engine.llm.max_context


def test_tokens_are_counted_as_an_answer_s_prompt_is(claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": SUM, "tools": [CALCULATOR], "system": "Be brief."}
    counted = claude.messages.count_tokens(**asked).input_tokens
    used = claude.messages.create(max_tokens=1, **asked).usage
    assert counted == used.input_tokens + (used.cache_read_input_tokens or 0)


def test_marks_of_the_cache_are_taken_and_what_it_saved_is_told(claude: anthropic.Anthropic) -> None:
    mark = {"type": "ephemeral", "ttl": "1h"}
    system: Any = [{"type": "text", "text": "You count well. " * 12, "cache_control": mark}]
    first = claude.messages.create(messages=QUESTION, system=system, **ASKED)
    again = claude.messages.create(messages=QUESTION, system=system, **ASKED)
    assert (again.usage.cache_read_input_tokens or 0) >= 32
    assert text_of(again) == text_of(first)


def test_thoughts_are_blocks_and_may_be_sent_back(
    thinking_model: Callable[..., Path],
    start: Callable[..., Serving],
    until: Callable[[Callable[[], bool], str], None],
) -> None:
    folder = thinking_model("{%- if add_generation_prompt %}{{ '<think>\\n' }}{%- endif %}", has_tags=False)
    with start(load=lambda: AsyncLLM(folder)) as running, client_of(running) as claude:
        until(lambda: running.service.state == "ready", "the model")
        message = claude.messages.create(messages=QUESTION, **ASKED)
        with claude.messages.stream(messages=QUESTION, **ASKED) as stream:
            kinds = {event.type for event in stream}
            told = [
                block.model_dump(exclude={"parsed_output"}) for block in stream.get_final_message().content
            ]
            assert told == [block.model_dump() for block in message.content]
        assert message.content[0].type == "thinking" and "thinking" in kinds
        turns: list[Any] = [*QUESTION, {"role": "assistant", "content": message.content}, *SUM]
        assert claude.messages.create(messages=turns, **ASKED).type == "message"
        with pytest.raises(anthropic.BadRequestError, match="thinking"):
            claude.messages.create(messages=QUESTION, thinking={"type": "disabled"}, **ASKED)


@pytest.mark.parametrize("header", ["Authorization", "X-Api-Key"])
def test_the_key_comes_in_either_header(start: Callable[..., Serving], header: str) -> None:
    with start(ServerSettings(api_keys=("secret",))) as running:
        good: Any = (
            {"auth_token": "secret", "api_key": None} if header == "Authorization" else {"api_key": "secret"}
        )
        with client_of(running, **good) as claude:
            assert claude.messages.count_tokens(model="demo", messages=QUESTION).input_tokens
        with (
            client_of(running, api_key="wrong") as other,
            pytest.raises(anthropic.AuthenticationError) as caught,
        ):
            other.messages.count_tokens(model="demo", messages=QUESTION)
        assert caught.value.type == "authentication_error"


def test_other_names_stand_for_the_model(start: Callable[..., Serving]) -> None:
    with start(ServerSettings(aliases=("claude-*",))) as running, client_of(running) as claude:
        asked: dict[str, Any] = {**ASKED, "model": "claude-of-tomorrow"}
        assert claude.messages.create(messages=QUESTION, **asked).model == "demo"
        with pytest.raises(anthropic.NotFoundError) as caught:
            claude.messages.create(messages=QUESTION, **{**asked, "model": "gpt-4"})
        assert caught.value.type == "not_found_error"


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "It"}]}, "messages[1].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]},
            "content[0].type",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [CALCULATOR], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        (
            {"tools": [{**CALCULATOR, "input_schema": {"type": "nonsense"}}], "tool_choice": {"type": "any"}},
            "input_schema",
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": 5}}}},
            "output_config.format",
        ),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"container": "x"}, "container"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"service_tier": "batch"}, "service_tier"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"stop_sequences": 5}, "stop_sequences"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(
    http: httpx.Client, change: dict[str, Any], named: str
) -> None:
    answer = http.post(PATH, json={**RAW, "messages": QUESTION, **change})
    error = answer.json()["error"]
    assert (answer.status_code, answer.json()["type"]) == (400, "error"), answer.text
    assert error["type"] == "invalid_request_error" and named in error["message"], error


def test_a_fault_in_mid_stream_is_an_event_of_theirs(start: Callable[..., Serving]) -> None:
    with start() as running, client_of(running) as claude:
        running.slow_down(0.02)
        with (
            pytest.raises(anthropic.APIStatusError) as caught,
            claude.messages.stream(
                messages=QUESTION, **{**ASKED, "extra_body": {"temperature": 0, "ignore_eos": True}}
            ) as told,
        ):
            for number, _ in enumerate(told):
                if number == 5:
                    running.engine.stop_all("The server is shutting down.")
        assert caught.value.body == {
            "type": "error",
            "error": {"type": "overloaded_error", "message": "The server is shutting down."},
        }


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("user", "a"), ("user", "b")], [("user", "a\nb")]),
        (
            [("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d")],
            [("user", "a"), ("assistant", "b\nc"), ("user", "d")],
        ),
        ([("user", "a"), ("system", "b"), ("user", "c")], [("user", "a"), ("system", "b"), ("user", "c")]),
    ],
)
def test_turns_of_one_role_are_one(turns: list[tuple[str, str]], expected: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": text} for role, text in turns]
    chat = chat_of(CountBody.model_validate({"messages": messages}))
    assert [(message.role, message.content) for message in chat.messages] == expected


def test_results_of_calls_and_what_is_said_with_them_keep_their_order() -> None:
    content = [
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "5"}]},
        {"type": "tool_result", "tool_use_id": "2", "content": "no file", "is_error": True},
        {"type": "text", "text": "Go on."},
    ]
    calls = [{"type": "tool_use", "id": i, "name": "f", "input": {"x": 1}} for i in ("1", "2")]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}, *calls]},
        {"role": "user", "content": content},
    ]
    body = MessageBody.model_validate(
        {"messages": messages, "system": "s", "max_tokens": 5, "stop_sequences": ["x"]}
    )
    chat = chat_of(body)
    told = [(m.role, m.content, m.tool_call_id) for m in chat.messages]
    assert told[3:] == [("tool", "5", "1"), ("tool", "Error: no file", "2"), ("user", "Go on.", None)]
    assert [(m.role, m.content) for m in chat.messages[:3]] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
    ]
    assert [json.loads(call.function.arguments) for call in chat.messages[2].tool_calls] == [{"x": 1}] * 2
    assert (chat.stop, chat.max_tokens) == (["x"], 5)
