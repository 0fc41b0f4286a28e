"""A template that opens the thought itself: the answer is reasoning in every interface, streamed or whole."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tiny_llm import LLM, AsyncLLM, SamplingParams

if TYPE_CHECKING:
    import httpx2 as httpx

    from tests.server.conftest import Running

MESSAGES = [{"role": "user", "content": "What is a token?"}]
LIMIT = 12
CHAT = "/v1/chat/completions"
OPENS = "{%- if add_generation_prompt %}{{ '<think>\\n' }}{%- endif %}"


@pytest.fixture(scope="module")
def thinker(thinking_model: Callable[..., Path]) -> Path:
    """The bundled model under a template as R1's distillations and QwQ have it."""
    return thinking_model(OPENS, has_tags=False)


@pytest.fixture(scope="module")
def thinking(
    thinker: Path,
    start: Callable[..., contextlib.AbstractContextManager[Running]],
    until: Callable[[Callable[[], bool], str], None],
) -> Iterator[httpx.Client]:
    with start(load=lambda: AsyncLLM(thinker)) as running, running.http() as http:
        until(lambda: running.service.state == "ready", "the model")
        yield http


@pytest.fixture(scope="module")
def former(thinking_model: Callable[..., Path]) -> Path:
    """The same, its tags tokens."""
    return thinking_model(OPENS)


@pytest.fixture(scope="module")
def tag_id(former: Path) -> int:
    """The token that closes a thought."""
    (found,) = LLM(former).tokenizer.encode("</think>", add_special_tokens=False)
    return found


@pytest.fixture(scope="module")
def forming(
    former: Path,
    start: Callable[..., contextlib.AbstractContextManager[Running]],
    until: Callable[[Callable[[], bool], str], None],
) -> Iterator[httpx.Client]:
    with start(load=lambda: AsyncLLM(former)) as running, running.http() as http:
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


SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3}
FUNCTION = {"name": "f", "description": "An f."}
FORMS = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, None),
    ({"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"}, ["f", "{}"]),
    ({"regex": "\\[[0-9]\\]"}, None),
]


@pytest.mark.parametrize(("form", "call"), FORMS, ids=["schema", "call", "regex"])
def test_who_thinks_first_keeps_to_the_form_behind_it_whole_and_streamed(
    forming: httpx.Client, tag_id: int, form: dict[str, Any], call: list[str] | None
) -> None:
    """The thought closes soon, as its end is likely; a part never has what is another's."""
    ask = {"temperature": 2, "seed": 4, "max_tokens": 600, "logit_bias": {tag_id: 8}, "messages": MESSAGES}
    message = forming.post(CHAT, json={**ask, **form, "parallel_tool_calls": False}).json()["choices"][0]
    assert message["finish_reason"] == ("tool_calls" if call else "stop"), message
    whole = message["message"]
    assert whole["reasoning_content"] and "</think>" not in json.dumps(whole), whole
    asked = {**ask, **form, "parallel_tool_calls": False, "stream": True}
    lines = forming.post(CHAT, json=asked).text.splitlines()
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == whole["reasoning_content"]
    assert "".join(delta.get("content") or "" for delta in deltas) == (whole["content"] or "")
    calls = [part["function"] for delta in deltas for part in delta.get("tool_calls", [])]
    assert [part["name"] for part in calls if part.get("name")] == ([call[0]] if call else [])
    assert "".join(part.get("arguments", "") for part in calls) == (call[1] if call else "")
    if call is None:
        assert isinstance(json.loads(whole["content"]), list)


def test_responses_tell_a_thought_before_a_form(forming: httpx.Client, tag_id: int) -> None:
    ask = {"input": MESSAGES, "temperature": 2, "seed": 4, "max_output_tokens": 600}
    form = {"type": "json_schema", "name": "x", "schema": SCHEMA}
    body = {**ask, "logit_bias": {tag_id: 8}, "text": {"format": form}}
    response = forming.post("/v1/responses", json=body).json()
    thought, message = response["output"]
    assert (thought["type"], message["type"]) == ("reasoning", "message"), response
    assert isinstance(json.loads(message["content"][0]["text"]), list)
    lines = forming.post("/v1/responses", json={**body, "stream": True}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    told = events[-1]["response"]["output"]
    assert [item.get("content") for item in told] == [item.get("content") for item in response["output"]]
