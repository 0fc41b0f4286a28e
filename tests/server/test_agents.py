"""An agent library of others, which knows nothing of us, uses a tool by means of the bundled model."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from openai import AsyncOpenAI
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

if TYPE_CHECKING:
    from tests.server.conftest import Running


@pytest.mark.slow
@pytest.mark.parametrize("interface", [OpenAIChatModel, OpenAIResponsesModel])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_loop_ends_with_the_right_number(running: Running, interface: Any, stream: bool) -> None:
    computed: list[str] = []

    async def ask() -> str:
        async with AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            model = interface("demo", provider=OpenAIProvider(openai_client=client))
            agent = Agent(model, model_settings={"temperature": 0.0, "max_tokens": 200})

            @agent.tool_plain
            def calculator(expression: str) -> str:
                """Compute an arithmetic expression.

                Args:
                    expression: For example 12 * 7.
                """
                computed.append(expression)
                a, operator, b = expression.split()
                assert operator == "+"
                return str(int(a) + int(b))

            if not stream:
                return str((await agent.run("What is 123 + 456?")).output)
            async with agent.run_stream("What is 123 + 456?") as events:
                return str(await events.get_output())

    assert "579" in asyncio.run(ask())
    assert computed == ["123 + 456"]
    running.wait_until_idle()
