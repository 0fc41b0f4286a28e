"""litellm as a library, which SDKs and gateways have beneath them: chat, streams, tools, forms, errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm
import pytest
from pydantic import BaseModel, Field

ASK = [{"role": "user", "content": "What is a KV cache?"}]
SUM = [{"role": "user", "content": "What is 123 + 456?"}]


class Point(BaseModel, extra="forbid"):
    x: int = Field(ge=0, le=9)
    y: int = Field(ge=0, le=9)


class Shape(BaseModel, extra="forbid"):
    name: str = Field(max_length=9)
    corner: Point
    others: list[Point] = Field(max_length=2)


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


@pytest.fixture(params=["openai", "hosted_vllm"])
def asked(request: pytest.FixtureRequest, url: str) -> dict[str, Any]:
    """What all calls have; each of two providers of litellm's."""
    model = f"{request.param}/demo"
    where = {"api_base": f"{url}/v1", "api_key": "none"}
    return {"model": model, **where, "temperature": 0, "max_tokens": 300, "num_retries": 0}


def test_an_answer_and_its_stream_are_the_same(asked: dict[str, Any]) -> None:
    whole = litellm.completion(messages=ASK, **asked)
    text = whole.choices[0].message.content
    assert "cache" in text and whole.usage.total_tokens > whole.usage.completion_tokens > 0
    chunks = list(
        litellm.completion(messages=ASK, stream=True, stream_options={"include_usage": True}, **asked)
    )
    joined = litellm.stream_chunk_builder(chunks, messages=ASK)
    assert joined.choices[0].message.content == text
    assert joined.usage.completion_tokens == whole.usage.completion_tokens

    async def at_once() -> list[Any]:
        return await asyncio.gather(*(litellm.acompletion(messages=ASK, **asked) for _ in range(3)))

    assert [one.choices[0].message.content for one in asyncio.run(at_once())] == [text] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_its_messages_go_back_with_a_tools_result(asked: dict[str, Any], stream: bool) -> None:
    asked = {**asked, "tools": [CALCULATOR]}
    told = litellm.completion(messages=SUM, stream=stream, **asked)
    if stream:
        told = litellm.stream_chunk_builder(list(told), messages=SUM)
    message = told.choices[0].message
    [call] = message.tool_calls
    assert json.loads(call.function.arguments) == {"expression": "123 + 456"}
    result = {"role": "tool", "tool_call_id": call.id, "name": "calculator", "content": "579"}
    final = litellm.completion(messages=[*SUM, message, result], **asked)
    assert "579" in final.choices[0].message.content
    again = [*SUM, message, result, final.choices[0].message, *ASK]
    assert "cache" in litellm.completion(messages=again, **asked).choices[0].message.content


def test_a_form_of_nested_models(asked: dict[str, Any]) -> None:
    told = litellm.completion(messages=[{"role": "user", "content": "Draw."}], response_format=Shape, **asked)
    assert Shape.model_validate_json(told.choices[0].message.content)


def test_responses_and_plain_completions(asked: dict[str, Any]) -> None:
    options = {name: asked[name] for name in ("model", "api_base", "api_key", "temperature")}
    told = litellm.responses(input="What is a KV cache?", max_output_tokens=300, **options)
    assert "cache" in told.output[-1].content[0].text and told.usage.output_tokens > 0
    *_, done = litellm.responses(input="What is a KV cache?", max_output_tokens=300, stream=True, **options)
    assert done.response.output[-1].content[0].text == told.output[-1].content[0].text
    text = litellm.text_completion(prompt="Once upon a time", max_tokens=8, **options).choices[0].text
    pieces = litellm.text_completion(prompt="Once upon a time", max_tokens=8, stream=True, **options)
    assert "".join(piece.choices[0].text or "" for piece in pieces) == text != ""


def test_errors_are_its_own_kinds(asked: dict[str, Any], guarded: str) -> None:
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=ASK, **{**asked, "api_base": f"{guarded}/v1"})
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "word " * 3000}], **asked)


def test_vectors_come_as_numbers_and_as_bytes(asked: dict[str, Any]) -> None:
    how = {name: asked[name] for name in ("model", "api_base", "api_key", "num_retries")}
    for encoding in ("float", "base64"):
        got = litellm.embedding(input=["a fox", "a wolf"], encoding_format=encoding, **how)
        assert [one["index"] for one in got.data] == [0, 1] and got.usage.prompt_tokens > 2
        assert all(one["embedding"] for one in got.data)
    with pytest.raises(litellm.BadRequestError, match="A text is empty"):
        litellm.embedding(input=["a", ""], **how)
