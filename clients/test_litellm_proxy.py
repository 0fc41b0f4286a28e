"""litellm's proxy before the server: chat, streams, tools, forms, responses, Anthropic's messages, errors."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

ASK: list[Any] = [{"role": "user", "content": "What is a KV cache?"}]
SUM: list[Any] = [{"role": "user", "content": "What is 123 + 456?"}]
PARAMETERS = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
ABOUT = "Compute an arithmetic expression."
CALCULATOR: Any = {
    "type": "function",
    "function": {"name": "calculator", "description": ABOUT, "parameters": PARAMETERS},
}
DIGIT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["x"],
    "additionalProperties": False,
}
PATIENCE_S = 180.0  # it reads for half a minute before it listens


@pytest.fixture(scope="module")
def proxy(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of the proxy, which knows the server as each of two providers of litellm's."""
    folder, key = tmp_path_factory.mktemp("proxy"), f"sk-{secrets.token_hex(16)}"
    models = [
        {
            "model_name": provider,
            "litellm_params": {"model": f"{provider}/demo", "api_base": f"{url}/v1", "api_key": "none"},
        }
        for provider in ("openai", "hosted_vllm")
    ]
    config = {"model_list": models, "litellm_settings": {"telemetry": False, "num_retries": 0}}
    (folder / "config.yaml").write_text(json.dumps(config), "utf-8")  # which is YAML, too
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = str(bound.getsockname()[1])
    command = [sys.executable, "-c", "import litellm; litellm.run_server()"]
    command += ["--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", port]
    own = {"LITELLM_MASTER_KEY": key, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(
            command, env={**os.environ, **own}, cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health/liveliness", child, folder / "log")
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0) as client:
            yield client
    finally:
        child.terminate()
        child.wait(30)


def wait_for(place: str, child: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while child.poll() is None and time.monotonic() < end:
        try:
            if httpx.get(place, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(f"the proxy did not start:\n{log.read_text('utf-8')[-3000:]}")


@pytest.fixture(params=["openai", "hosted_vllm"])
def asked(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"model": request.param, "temperature": 0, "max_tokens": 300}


def test_an_answer_and_its_stream_are_the_servers(
    proxy: openai.OpenAI, asked: dict[str, Any], url: str
) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as ours:
        text = (
            ours.chat.completions.create(messages=ASK, **{**asked, "model": "demo"})
            .choices[0]
            .message.content
        )
    whole = proxy.chat.completions.create(messages=ASK, **asked)
    assert whole.choices[0].message.content == text and "cache" in (text or "")
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(proxy.chat.completions.create(messages=ASK, **options, **asked))
    told = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(told) == text
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_a_call_and_its_result_go_back_and_forth(proxy: openai.OpenAI, asked: dict[str, Any]) -> None:
    message = proxy.chat.completions.create(messages=SUM, tools=[CALCULATOR], **asked).choices[0].message
    [call] = message.tool_calls or ()
    assert json.loads(call.function.arguments) == {"expression": "123 + 456"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "579"}
    final = proxy.chat.completions.create(messages=[*SUM, message, result], tools=[CALCULATOR], **asked)
    assert "579" in (final.choices[0].message.content or "")


def test_a_form(proxy: openai.OpenAI, asked: dict[str, Any]) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "digit", "schema": DIGIT}}
    told = proxy.chat.completions.create(messages=ASK, response_format=form, **asked)
    assert json.loads(told.choices[0].message.content or "")["x"] in range(10)


def test_responses_plain_completions_and_anthropics_messages(
    proxy: openai.OpenAI, asked: dict[str, Any]
) -> None:
    named = {"model": asked["model"], "temperature": 0}
    whole = proxy.responses.create(input="What is a KV cache?", max_output_tokens=300, **named)
    assert "cache" in whole.output_text
    events = proxy.responses.create(input="What is a KV cache?", max_output_tokens=300, stream=True, **named)
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces) == whole.output_text
    assert proxy.completions.create(prompt="Once upon a time", max_tokens=8, **named).choices[0].text
    body = {"messages": ASK, "max_tokens": 300, **named}
    told = httpx.post(
        f"{proxy.base_url}messages", headers={"x-api-key": proxy.api_key}, json=body, timeout=60
    )
    assert told.status_code == 200 and "cache" in told.json()["content"][0]["text"], told.text


def test_a_prompt_that_is_too_long_is_known_as_such(proxy: openai.OpenAI, asked: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="ContextWindowExceededError"):
        proxy.chat.completions.create(messages=[{"role": "user", "content": "word " * 3000}], **asked)
