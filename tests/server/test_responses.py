"""POST /v1/responses through the real openai client: items, events, tools, forms, what is refused."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any, Literal

import openai
import pydantic
import pytest

from tiny_llm.data import MessageDelta, ToolCallDelta
from tiny_llm.server.answers import WrittenArray
from tiny_llm.server.problems import Problem
from tiny_llm.server.response_bodies import ResponseBody, chat_of
from tiny_llm.server.response_items import Items
from tiny_llm.server.settings import ServerSettings
from tiny_llm.server.stored import StoredResponses

if TYPE_CHECKING:
    import httpx2 as httpx

    from tests.server.conftest import Running

PATH, CHAT = "/v1/responses", "/v1/chat/completions"
QUESTION = "What is a KV cache?"
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0}
CALCULATOR = {
    "type": "function",
    "name": "calculator",
    "description": "Compute an arithmetic expression.",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "For example 12 * 7."}},
        "required": ["expression"],
    },
}


def said(http: httpx.Client, **fields: Any) -> str:
    """What a chat says to the same."""
    messages = [{"role": "user", "content": QUESTION}]
    answer = http.post(CHAT, json={"messages": messages, "max_tokens": 64, **GREEDY, **fields})
    return str(answer.json()["choices"][0]["message"]["content"])


def test_it_says_what_a_chat_says(client: openai.OpenAI, http: httpx.Client) -> None:
    got = client.responses.create(input=QUESTION, max_output_tokens=64, **GREEDY)
    assert got.output_text == said(http) and got.status == "completed" and got.id.startswith("resp")
    assert got.usage is not None and got.usage.output_tokens > 0
    assert got.usage.total_tokens == got.usage.input_tokens + got.usage.output_tokens
    told = client.responses.create(
        input=[{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}],
        instructions="Answer in one word.",
        max_output_tokens=3,
        metadata={"a": "b"},
        store=False,
        **GREEDY,
    )
    assert told.status == "incomplete" and told.incomplete_details is not None
    assert told.incomplete_details.reason == "max_output_tokens" and told.metadata == {"a": "b"}
    messages = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": QUESTION}]
    assert told.output_text == said(http, messages=messages, max_tokens=3)
    assert told.instructions == "Answer in one word." and told.store is False


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_turn_goes_on_from_a_response_that_is_kept(client: openai.OpenAI, stream: bool) -> None:
    """Its whole conversation counts, also that of the one before it; instructions do not."""

    def answer(**asked: Any) -> Any:
        if not stream:
            return client.responses.create(max_output_tokens=64, **GREEDY, **asked)
        with client.responses.stream(max_output_tokens=64, **GREEDY, **asked) as events:
            return events.get_final_response()

    questions = (QUESTION, "What is a block table?", "What is a token?")
    items: list[Any] = []
    last = None
    for question in questions:
        items.append({"role": "user", "content": question})
        last = answer(input=question, previous_response_id=last and last.id)
        told = client.responses.create(input=items, max_output_tokens=64, store=False, **GREEDY)
        assert last.output_text == told.output_text
        items += [item.model_dump() for item in told.output]
    assert last.store and last.previous_response_id
    assert client.responses.retrieve(last.id).output_text == last.output_text
    client.responses.delete(last.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(last.id)


def test_a_response_that_is_not_to_be_kept_is_not(client: openai.OpenAI) -> None:
    first = client.responses.create(input=QUESTION, max_output_tokens=4, store=False, **GREEDY)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(input=QUESTION, previous_response_id=first.id, **GREEDY)
    assert caught.value.param == "previous_response_id" and caught.value.code == "response_not_found"


def test_a_key_goes_on_from_its_own_responses_only(start: Any) -> None:
    with (
        start(ServerSettings(api_keys=("one", "two"))) as own,
        own.openai("one") as one,
        own.openai("two") as two,
    ):
        first = one.responses.create(input=QUESTION, max_output_tokens=4, **GREEDY)
        for ask in (two.responses.retrieve, two.responses.delete):
            with pytest.raises(openai.NotFoundError):
                ask(first.id)
        assert one.responses.retrieve(first.id).id == first.id


def test_what_is_kept_has_bounds() -> None:
    """The least recently used goes first, and what was not used for a while."""
    now = [0.0]
    kept = StoredResponses(100, 60.0, lambda: now[0])

    def there() -> list[str]:
        found = []
        for name in "abcd":
            with contextlib.suppress(Problem):
                kept.get("", name)
                found.append(name)
        return found

    for name in "ab":
        kept.add("", name, b"x" * 30, [], 10)
    kept.get("", "a")
    kept.add("", "c", b"x" * 30, [], 10)
    assert there() == ["a", "c"]
    now[0] = 61.0
    assert there() == []
    kept.add("", "d", b"x" * 200, [], 0)
    assert there() == []


def test_a_second_turn_takes_the_first_one_s_items(client: openai.OpenAI, http: httpx.Client) -> None:
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    first = client.responses.create(input=items, max_output_tokens=64, **GREEDY)
    items += [item.model_dump() for item in first.output]
    items.append({"role": "user", "content": "What is a block table?"})
    second = client.responses.create(input=items, max_output_tokens=64, **GREEDY)
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "What is a block table?"},
    ]
    assert second.output_text == said(http, messages=messages)
    assert second.usage is not None and second.usage.input_tokens_details.cached_tokens > 0


def test_the_events_are_the_real_ones_and_join_to_the_whole(client: openai.OpenAI) -> None:
    whole = client.responses.create(input=QUESTION, max_output_tokens=32, **GREEDY)
    events = list(client.responses.create(input=QUESTION, max_output_tokens=32, stream=True, **GREEDY))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1]
    assert last.type == "response.completed" or last.type == "response.incomplete"
    assert text == whole.output_text == last.response.output_text
    assert last.response.usage is not None and whole.usage is not None
    assert last.response.usage.output_tokens == whole.usage.output_tokens
    with client.responses.stream(input=QUESTION, max_output_tokens=99, **GREEDY) as stream:
        final = stream.get_final_response()
    assert final.output_text.startswith(text[:20])


def test_parse_gives_a_pydantic_model(client: openai.OpenAI) -> None:
    class Door(pydantic.BaseModel):
        color: Literal["red", "green"]
        width: int

    got = client.responses.parse(input="Describe the red door.", text_format=Door, **GREEDY)
    assert isinstance(got.output_parsed, Door)
    with client.responses.stream(input="Describe the red door.", text_format=Door, **GREEDY) as stream:
        assert stream.get_final_response().output_parsed == got.output_parsed
    loose = client.responses.create(
        input="Describe it.", text={"format": {"type": "json_object"}}, max_output_tokens=300, **GREEDY
    )
    assert loose.status == "incomplete" or isinstance(json.loads(loose.output_text), dict)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_loop_ends_with_the_right_number(client: openai.OpenAI, stream: bool) -> None:
    items: list[Any] = [{"role": "user", "content": "What is 123 + 456?"}]
    asked: dict[str, Any] = {"tools": [CALCULATOR], **GREEDY}
    if stream:
        with client.responses.stream(input=items, **asked) as events:
            kinds = [event.type for event in events]
            first: Any = events.get_final_response()
        assert "response.function_call_arguments.delta" in kinds
        assert "response.output_text.delta" not in kinds, "a call never shows as text"
    else:
        first = client.responses.create(input=items, **asked)
    (call,) = first.output
    assert call.type == "function_call" and call.name == "calculator" and call.status == "completed"
    a, operator, b = json.loads(call.arguments)["expression"].split()
    assert operator == "+"
    items.append(call.model_dump())
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": str(int(a) + int(b))})
    final = client.responses.create(input=items, **asked)
    assert "579" in final.output_text and final.output[0].type == "message"


def test_a_demanded_call_is_made(client: openai.OpenAI) -> None:
    for choice in ("required", {"type": "function", "name": "calculator"}):
        got = client.responses.create(
            input="Hello.", tools=[CALCULATOR], tool_choice=choice, parallel_tool_calls=False, **GREEDY
        )
        assert [item.type for item in got.output] == ["function_call"]
        assert got.parallel_tool_calls is False and got.tools[0].type == "function"


def test_logprobs_are_of_the_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "input": QUESTION,
        "max_output_tokens": 6,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        **GREEDY,
    }
    got = client.responses.create(**asked).output[0]
    assert got.type == "message" and got.content[0].type == "output_text"
    rows = got.content[0].logprobs or []
    assert len(rows) == 6 and all(len(row.top_logprobs) == 2 for row in rows)
    assert b"".join(bytes(row.bytes) for row in rows).decode() == got.content[0].text
    events = client.responses.create(stream=True, **asked)
    parts = [event.logprobs for event in events if event.type == "response.output_text.delta"]
    assert [row.token for part in parts for row in part] == [row.token for row in rows]


def test_reasoning_and_calls_are_items_of_their_own() -> None:
    items = Items(lambda rows: WrittenArray(lambda: map(str, rows)))
    deltas = [
        MessageDelta(reasoning="Hm"),
        MessageDelta(reasoning="."),
        MessageDelta(content="Let me see."),
        MessageDelta(tool_call=ToolCallDelta(0, "", "c1", "f")),
        MessageDelta(tool_call=ToolCallDelta(0, "{}")),
        MessageDelta(tool_call=ToolCallDelta(1, "", "c2", "g")),
    ]
    events = [event for delta in deltas for event in items.push([delta], [])] + list(
        items.finish(whole=False)
    )
    assert [item["type"] for item in items.done] == ["reasoning", "message", "function_call", "function_call"]
    assert [item["status"] for item in items.done] == ["completed"] * 3 + ["incomplete"]
    assert items.done[0]["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert items.done[2]["arguments"] == "{}" and items.done[2]["call_id"] == "c1"
    assert len({item["id"] for item in items.done}) == 4
    added = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    assert added == [0, 1, 2, 3]
    assert sum(event["type"] == "response.reasoning_text.delta" for event in events) == 2


def test_items_become_the_messages_that_they_were() -> None:
    body = ResponseBody.model_validate(
        {
            "instructions": "Be brief.",
            "input": [
                {"role": "developer", "content": "In English."},
                {"role": "user", "content": "1 + 2?"},
                {"type": "reasoning", "id": "rs-1", "summary": [], "content": [
                    {"type": "reasoning_text", "text": "Add."}]},
                {"type": "message", "role": "assistant", "content": "I compute."},
                {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "b", "name": "g", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "a", "output": "3"},
                {"type": "function_call_output", "call_id": "b", "output": "4"},
                {"type": "message", "role": "assistant", "content": "3."},
            ],
        }
    )  # fmt: skip
    messages = [message.model_dump(exclude_defaults=True) for message in chat_of(body).messages]
    assert messages[0] == {"role": "system", "content": "Be brief.\n\nIn English."}
    assert [message["role"] for message in messages] == [
        "system", "user", "assistant", "tool", "tool", "assistant",
    ]  # fmt: skip
    made = messages[2]
    assert made["content"] == "I compute." and made["reasoning_content"] == "Add."
    assert [call["id"] for call in made["tool_calls"]] == ["a", "b"]
    assert messages[5] == {"role": "assistant", "content": "3."}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"conversation": "conv-1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"include": ["web_search_call.results"]}, "include[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format"),
        ({"tools": [{**CALCULATOR, "parameters": {"type": 123}}]}, "tools[0].parameters"),
        ({"tools": [CALCULATOR, {**CALCULATOR, "parameters": {"$ref": "#/no"}}]}, "tools[1].parameters"),
        ({"tools": [{**CALCULATOR, "name": ""}]}, "tools[0].name"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "call_id": "a", "arguments": ""}]}, "input[0].name"),
        ({"input": "word " * 5000}, "input"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_had_is_refused_by_its_name(http: httpx.Client, fields: Any, param: str) -> None:
    answer = http.post(PATH, json={"input": "Hello", **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and ".function" not in error["message"], answer.text


def test_a_failure_in_mid_stream_is_raised_by_the_client(start: Any) -> None:
    with start() as one, one.openai() as client:
        spoil(one, 5)
        with pytest.raises(openai.APIError, match="MemoryError"):
            for _ in client.responses.create(input="Hello", stream=True, max_output_tokens=50, **GREEDY):
                pass
        one.wait_until_idle()


def spoil(running: Running, calls: int) -> None:
    """The model fails in its ``calls``-th call from now."""
    engine = running.engine.llm.engine
    model, made = engine.runner.model, [0]

    def spoilt(*args: Any) -> Any:
        made[0] += 1
        if made[0] == calls:
            raise MemoryError("by design")
        return model(*args)

    spoilt.config = model.config  # type: ignore[attr-defined]
    engine.runner.model = spoilt  # type: ignore[assignment]
