"""langchain-openai, as its documentation uses it: chat, streams, tools, structured output, errors."""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any

import openai
import pydantic
import pytest

if TYPE_CHECKING:
    from tests.server.conftest import Running

ASK = "What is a KV cache?"
SUM = "What is 123 + 456?"


class Point(pydantic.BaseModel, extra="forbid"):
    x: int = pydantic.Field(ge=0, le=9)
    y: int = pydantic.Field(ge=0, le=9)


class Shape(pydantic.BaseModel, extra="forbid"):
    """A shape on a grid."""

    name: str = pydantic.Field(max_length=9)
    corner: Point
    others: list[Point] = pydantic.Field(max_length=2)


class calculator(pydantic.BaseModel):  # the name that the bundled model knows
    """Compute an arithmetic expression."""

    expression: str = pydantic.Field(description="For example 12 * 7.")


@pytest.fixture(scope="module")
def langchain() -> Any:
    """Its import takes seconds: here, and not in every process that collects tests."""
    return importlib.import_module("langchain_openai")


@pytest.fixture(params=["chat", "responses"])
def chat(request: pytest.FixtureRequest, langchain: Any, running: Running) -> Any:
    """A ChatOpenAI for each of the two interfaces."""
    return made(langchain, running, use_responses_api=request.param == "responses")


def made(langchain: Any, running: Running, **options: Any) -> Any:
    asked = {"model": "demo", "temperature": 0, "max_tokens": 200, "max_retries": 0, "stream_usage": True}
    return langchain.ChatOpenAI(base_url=f"{running.url}/v1", api_key="none", **{**asked, **options})


@pytest.mark.slow
def test_an_answer_and_its_stream_are_the_same(chat: Any, client: openai.OpenAI) -> None:
    expected = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": ASK}], temperature=0
    )
    whole = chat.invoke(ASK)
    assert whole.text == expected.choices[0].message.content
    pieces = list(chat.stream(ASK))
    joined = sum(pieces[1:], pieces[0])
    assert len(pieces) > 5 and joined.text == whole.text

    assert expected.usage is not None
    for message in (whole, joined):
        used = message.usage_metadata
        assert used["input_tokens"] == expected.usage.prompt_tokens
        assert used["output_tokens"] == expected.usage.completion_tokens


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_its_messages_go_back_with_a_tools_result(chat: Any, stream: bool) -> None:
    tools = chat.bind_tools([calculator, Shape])
    messages: list[Any] = [("user", SUM)]
    if stream:
        pieces = list(tools.stream(messages))
        said = sum(pieces[1:], pieces[0])
    else:
        said = tools.invoke(messages)
    [call] = said.tool_calls
    assert (call["name"], call["args"]) == ("calculator", {"expression": "123 + 456"})
    assert not said.invalid_tool_calls
    messages += [said, {"role": "tool", "content": "579", "tool_call_id": call["id"]}]
    final = tools.invoke(messages)
    assert "579" in final.text and not final.tool_calls
    again = tools.invoke([*messages, final, ("user", ASK)])
    assert "cache" in again.text


@pytest.mark.slow
@pytest.mark.parametrize("strict", [None, True])
def test_a_demanded_call_has_nested_arguments(chat: Any, strict: bool | None) -> None:
    bound = chat.bind_tools([Shape, calculator], tool_choice="Shape", strict=strict)
    [call] = bound.invoke("Draw.").tool_calls
    assert call["name"] == "Shape" and Shape(**call["args"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output(chat: Any, method: str) -> None:
    if method == "json_mode":
        told = chat.with_structured_output(None, method=method).invoke("Ann is 30 years old. JSON:")
        assert isinstance(told, dict)
        return
    form = chat.with_structured_output(Shape, method=method, include_raw=True)
    told = form.invoke("Draw.")
    assert isinstance(told["parsed"], Shape), told
    pieces = list(chat.with_structured_output(Shape, method=method).stream("Draw."))
    assert pieces[-1] == told["parsed"]


@pytest.mark.slow
def test_it_asks_at_once(langchain: Any, running: Running) -> None:
    """All in one event loop: the clients share connections, which belong to it."""

    async def asked(interface: str) -> None:
        chat = made(langchain, running, use_responses_api=interface == "responses")
        alone, parts = await chat.ainvoke(ASK), [part async for part in chat.astream(ASK)]
        both = await chat.abatch([ASK, "Hi"])
        assert alone.text == both[0].text == "".join(part.text for part in parts) != both[1].text

    async def of_both() -> None:
        await asyncio.gather(asked("chat"), asked("responses"))

    asyncio.run(of_both())


@pytest.mark.slow
def test_log_probabilities_stops_and_plain_completions(langchain: Any, running: Running) -> None:
    chat = made(langchain, running)
    told = chat.bind(logprobs=True, top_logprobs=2).invoke(ASK)
    assert told.response_metadata["finish_reason"] == "stop"
    said = told.response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in said) == told.text and len(said[0]["top_logprobs"]) == 2
    assert "key" not in chat.invoke(ASK, stop=["key"]).text
    text = langchain.OpenAI(
        model="demo", base_url=f"{running.url}/v1", api_key="none", temperature=0, max_tokens=8
    )
    assert text.invoke("Once upon a time") == "".join(text.stream("Once upon a time"))


def test_a_prompt_too_long_is_the_error_that_it_has_for_that(chat: Any) -> None:
    overflow = importlib.import_module("langchain_core.exceptions").ContextOverflowError
    with pytest.raises(overflow, match="1024") as caught:
        chat.invoke("word " * 3000)
    assert isinstance(caught.value, openai.BadRequestError)
