"""A template that opens the thought itself: the answer is reasoning in every interface, streamed or whole."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tiny_llm import LLM, AsyncLLM, SamplingParams

if TYPE_CHECKING:
    import httpx2 as httpx

    from tests.server.conftest import Running

MESSAGES = [{"role": "user", "content": "What is a token?"}]
LIMIT = 12


@pytest.fixture
def thinker(demo_copy: Path) -> Path:
    """The bundled model under a template as R1's distillations and QwQ have it."""
    config = json.loads((demo_copy / "tokenizer_config.json").read_text())
    config["chat_template"] += "{%- if add_generation_prompt %}{{ '<think>\\n' }}{%- endif %}"
    (demo_copy / "tokenizer_config.json").write_text(json.dumps(config))
    return demo_copy


@pytest.fixture
def thinking(
    thinker: Path,
    start: Callable[..., contextlib.AbstractContextManager[Running]],
    until: Callable[[Callable[[], bool], str], None],
) -> Iterator[httpx.Client]:
    with start(load=lambda: AsyncLLM(thinker)) as running, running.http() as http:
        until(lambda: running.service.state == "ready", "the model")
        yield http


def test_what_a_prompt_opened_is_reasoning_in_chat_and_responses(
    thinking: httpx.Client, thinker: Path
) -> None:
    library = LLM(thinker).chat(MESSAGES, SamplingParams(max_tokens=LIMIT)).message
    assert library is not None and library.reasoning and library.content == "", library
    ask = {"messages": MESSAGES, "temperature": 0, "max_tokens": LIMIT}
    message = thinking.post("/v1/chat/completions", json=ask).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (library.reasoning, "")
    lines = thinking.post("/v1/chat/completions", json={**ask, "stream": True}).text.splitlines()
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == library.reasoning
    assert not any(delta.get("content") for delta in deltas)
    asked = {"input": MESSAGES, "temperature": 0, "max_output_tokens": LIMIT}
    response = thinking.post("/v1/responses", json=asked).json()
    assert [item["type"] for item in response["output"]] == ["reasoning"]
    usage = response["usage"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == usage["output_tokens"], usage


def test_a_form_holds_from_the_first_token_so_nothing_of_it_is_a_thought(thinker: Path) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    message = LLM(thinker).chat(MESSAGES, response_format=form).message
    assert message is not None and message.reasoning is None, message
    assert set(json.loads(message.content or "")) == {"ok"}
