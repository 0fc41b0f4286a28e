"""What published gateways make of an ordinary request, as they send it to a server: all of it is taken.
And what they ask of a server itself: its model, limits and load.

Recorded from vllm-router 0.1.17, sglang-router 0.3.2 and smg 1.13.0.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tiny_llm.scheduler.settings import SchedulerSettings

if TYPE_CHECKING:
    import httpx2 as httpx

    from tests.server.conftest import Running

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


def test_the_model_and_its_limits_are_told(running: Running) -> None:
    llm = running.engine.llm
    named = {"served_model_name": "demo", "model_path": "demo"}
    with running.http() as http:
        for path in ("/server_info", "/get_server_info"):
            told = http.get(path).json()
            assert told.pop("version") == http.get("/version").json()["version"]
            assert told == {
                **named,
                "dp_size": 1,
                "context_length": llm.max_context,
                "max_total_tokens": 512 * told["block_size"],  # of the fixture's 512 blocks
                "max_running_requests": llm.engine.settings.scheduler.max_num_seqs,
                "block_size": llm.engine.settings.block_size,
            }
        for path in ("/get_model_info", "/model_info"):
            told = http.get(path).json()
            assert told.items() >= {**named, "is_generation": True, "model_type": "qwen2"}.items()
            assert not told["has_image_understanding"]


def test_a_load_is_what_runs_now(start: Any, until: Any) -> None:
    """One answer under way: one sequence runs, and its blocks are in use; none after it."""

    def load(http: httpx.Client) -> dict[str, Any]:
        told = http.get("/v1/loads?include=core,disagg,queues,memory").json()
        assert told["dp_rank_count"] == 1
        [one] = told["loads"]
        assert one["token_usage"] == pytest.approx(one["num_used_tokens"] / one["max_total_num_tokens"])
        assert one["num_total_reqs"] == one["num_running_reqs"] + one["num_waiting_reqs"]
        return dict(one)

    scheduler = SchedulerSettings(max_num_seqs=1)
    with start(scheduler=scheduler) as running, running.http() as http, running.http() as other:
        before = load(http)
        assert (before["num_total_reqs"], before["num_used_tokens"], before["cache_hit_rate"]) == (0, 0, 0.0)
        running.slow_down(0.02)
        body = {"prompt": ["Hi " * 50] * 2, "max_tokens": 500, "ignore_eos": True, "stream": True}
        with other.stream("POST", TEXT, json=body) as answer:
            lines = answer.iter_lines()  # kept: without it the response closes
            next(lines)
            until(lambda: load(http)["num_total_reqs"] == 2, "both sequences to be there")
            now = load(http)
            assert (now["num_running_reqs"], now["num_waiting_reqs"], now["max_running_requests"]) == (
                1,
                1,
                1,
            )
            assert now["num_used_tokens"] >= 50
        running.wait_until_idle()
        after = http.get("/loads?model=demo").json()["loads"][0]
        assert (after["num_total_reqs"], after["num_used_tokens"]) == (0, 0)
        assert 0 <= after["cache_hit_rate"] <= 1
