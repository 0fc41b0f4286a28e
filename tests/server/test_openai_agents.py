"""openai-agents, as its documentation uses it: tools, handoffs, output types, sessions, streams, usage."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import openai
import pydantic
import pytest

if TYPE_CHECKING:
    from tests.server.conftest import Running

SUM = "What is 123 + 456?"
ASKED = {"temperature": 0, "max_tokens": 300, "include_usage": True}


class Point(pydantic.BaseModel):
    x: int = pydantic.Field(ge=0, le=9)
    y: int = pydantic.Field(ge=0, le=9)


class Shape(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=9)
    corner: Point
    others: list[Point] = pydantic.Field(max_length=2)


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: For example 12 * 7.
    """
    a, _, b = expression.split()
    return str(int(a) + int(b))


@pytest.fixture(scope="module")
def agents() -> Any:
    """Its import takes seconds: here, and not in every process that collects tests."""
    library = importlib.import_module("agents")
    library.set_tracing_disabled(True)
    return library


Using = Callable[..., Any]


@pytest.fixture(params=["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
def using(request: pytest.FixtureRequest, agents: Any, running: Running) -> Using:
    """``async with using(tools=...) as agent``: an Agent for each of the two interfaces."""

    @asynccontextmanager
    async def made(settings: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[Any]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            model = getattr(agents, request.param)(model="demo", openai_client=client)
            asked = agents.ModelSettings(**{**ASKED, **(settings or {})})
            yield agents.Agent(name="Demo", model=model, model_settings=asked, **options)

    return made


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_tools_result_comes_back_and_the_talk_goes_on(agents: Any, using: Using, stream: bool) -> None:
    async def talk() -> None:
        async with using(tools=[agents.function_tool(calculator)]) as agent:
            if stream:
                result = agents.Runner.run_streamed(agent, SUM)
                kinds = [event.type async for event in result.stream_events()]
                assert kinds.count("run_item_stream_event") == 3, "a call, its output, a message"
            else:
                result = await agents.Runner.run(agent, SUM)
            assert "579" in result.final_output
            used = result.context_wrapper.usage
            assert used.requests == 2 and used.total_tokens == used.input_tokens + used.output_tokens > 0
            asked = [*result.to_input_list(), {"role": "user", "content": "What is 12 + 30?"}]
            again = await agents.Runner.run(agent, asked)
            assert "42" in again.final_output

    run(talk())


@pytest.mark.slow
def test_an_output_type_of_nested_models(agents: Any, using: Using) -> None:
    async def ask() -> None:
        async with using(output_type=Shape) as agent:
            result = await agents.Runner.run(agent, "Draw.")
            assert isinstance(result.final_output, Shape)
            streamed = agents.Runner.run_streamed(agent, "Draw.")
            async for _ in streamed.stream_events():
                pass
            assert streamed.final_output == result.final_output

    run(ask())


@pytest.mark.slow
def test_a_demanded_tool_takes_nested_models(agents: Any, using: Using) -> None:
    drawn = []

    def draw(shape: Shape, filled: bool) -> str:
        """Draw a shape."""
        drawn.append(shape)
        return "done"

    async def ask() -> None:
        options = {"tools": [agents.function_tool(draw)], "tool_use_behavior": "stop_on_first_tool"}
        async with using({"tool_choice": "required"}, **options) as agent:
            assert (await agents.Runner.run(agent, "Draw.")).final_output == "done"
        assert isinstance(drawn[0], Shape)

    run(ask())


@pytest.mark.slow
def test_a_handoff_and_a_session(agents: Any, using: Using) -> None:
    async def talk() -> None:
        async with using() as answering, using({"tool_choice": "required"}, handoffs=[answering]) as first:
            session = agents.SQLiteSession("one")
            result = await agents.Runner.run(first, "What is a KV cache?", session=session)
            assert result.last_agent is answering and result.final_output
            told = await agents.Runner.run(answering, "What is 48 + 35?", session=session)
            assert told.final_output and len(await session.get_items()) == 6

    run(talk())


def test_errors_are_openais(agents: Any, using: Using) -> None:
    async def ask() -> None:
        async with using() as agent:
            with pytest.raises(openai.BadRequestError, match="1024") as caught:
                await agents.Runner.run(agent, "word " * 3000)
            assert caught.value.code == "context_length_exceeded"

    run(ask())
