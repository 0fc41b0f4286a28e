"""What published gateways make of an ordinary request, as they send it to a server: all of it is taken.

Recorded from vllm-router 0.1.17 and sglang-router 0.3.2; both worked with the server unchanged.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import httpx2 as httpx

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "content": "1", "tool_call_id": "a"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
FILLED_IN: dict[str, dict[str, Any]] = {
    "chat by vllm-router": {
        "logprobs": False,
        "response_format": {"type": "text"},
        "no_stop_trim": False,
        "ignore_eos": False,
        "continue_final_message": False,
        "skip_special_tokens": True,
        "separate_reasoning": True,
        "stream_reasoning": True,
        "return_hidden_states": False,
        "include_reasoning": True,
    },
    "chat by sglang-router": {
        "logprobs": False,
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "no_stop_trim": False,
        "ignore_eos": False,
        "continue_final_message": False,
        "skip_special_tokens": True,
        "separate_reasoning": True,
        "stream_reasoning": True,
        "return_hidden_states": False,
    },
    "text by both": {
        "echo": False,
        "no_stop_trim": False,
        "ignore_eos": False,
        "skip_special_tokens": True,
        "return_hidden_states": False,
    },
    "response by sglang-router": {
        "store": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "priority": 0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    },
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", FILLED_IN)
def test_what_a_gateway_fills_in_is_no_reason_to_refuse(http: httpx.Client, name: str, stream: bool) -> None:
    path, asked = {
        "chat": (CHAT, {"messages": HISTORY, "tools": TOOLS, "max_tokens": 5, "seed": 1}),
        "text": (TEXT, {"prompt": "Hi", "max_tokens": 5, "seed": 1}),
        "resp": (RESPONSES, {"input": "Hi", "max_output_tokens": 5, "seed": 1}),
    }[name[:4]]
    asked = {"model": "demo", **asked, "stream": stream}
    plain, filled = said(http, path, asked), said(http, path, {**asked, **FILLED_IN[name]})
    assert plain == filled and plain


def said(http: httpx.Client, path: str, body: dict[str, Any]) -> str:
    """An answer's text, whole or streamed."""
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    if not body["stream"]:
        told = answer.json()
        if path == RESPONSES:
            return str(told["output"][0]["content"][0]["text"])
        choice = told["choices"][0]
        return str(choice["text"] if path == TEXT else choice["message"]["content"])
    text = ""
    for line in answer.text.split("\n"):
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            if path == RESPONSES:
                text += event["delta"] if event["type"] == "response.output_text.delta" else ""
            else:
                choice = event["choices"][0]
                text += choice["text"] if path == TEXT else choice["delta"].get("content", "")
    return text
