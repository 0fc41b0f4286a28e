"""A field whose value asks for nothing is no reason to refuse; any other value is refused by its path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tiny_llm.server.neutral import REQUEST

if TYPE_CHECKING:
    import httpx2 as httpx

CHAT, TEXT, RESPONSES, GENERATE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/generate"
ASK = [{"role": "user", "content": "What is a KV cache?"}]
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": ASK, "max_tokens": 4, "temperature": 0},
    TEXT: {"prompt": "A cache", "max_tokens": 4, "temperature": 0},
    RESPONSES: {"input": ASK, "max_output_tokens": 4, "temperature": 0},
    GENERATE: {"prompt": "A cache", "max_tokens": 4},
}
LABELS = {
    "user": "u-1",
    "safety_identifier": "s-1",
    "prompt_cache_key": "k-1",
    "metadata": {"team": "red"},
    "priority": 0,
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"store": True}, "store"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"service_tier": "priority"}, "service_tier"),
    (CHAT, {"skip_special_tokens": False}, "skip_special_tokens"),
    (CHAT, {"store": 0}, "store"),
    (CHAT, {"metadata": {"a": 5}}, "metadata.a"),
    (
        CHAT,
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
    ),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"tool_choice": "sometimes"}, "tool_choice"),
    (CHAT, {"tool_choice": {"type": "function", "function": {"name": 5}}}, "tool_choice.function.name"),
    (CHAT, {"tool_choice": {"type": "auto"}}, "tool_choice.type"),
    (
        CHAT,
        {"tools": [{"type": "function", "function": {"name": "f", "scope": 1}}]},
        "tools[0].function.scope",
    ),
    (
        CHAT,
        {"messages": [*ASK, {"role": "assistant", "content": "x", "reasoning": "y"}]},
        "messages[1].reasoning",
    ),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "system", "content": None}, *ASK]}, "messages[0].content"),
    (CHAT, {"messages": [*ASK, {"role": "tool", "content": "1"}]}, "messages[1].tool_call_id"),
    (CHAT, {"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
        "messages[0].content[0].x",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
    ),
    (CHAT, {"logit_bias": {"5": 1, "x": 1}}, "logit_bias.x"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort"),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
    (TEXT, {"prompt": ["a", 1]}, "prompt[1]"),
    (TEXT, {"prompt": [[1], [1, "a"]]}, "prompt[1]"),
    (TEXT, {"prompt": [9999]}, "prompt"),
    (TEXT, {"best_of": 2}, "best_of"),
    (TEXT, {"max_tokens": 0}, "max_tokens"),
    (TEXT, {"suffix": "end"}, "suffix"),
    (GENERATE, {"stream": True, "stream_options": {"include_usage": True}}, "stream_options"),
    (RESPONSES, {"truncation": "auto"}, "truncation"),
    (RESPONSES, {"include": ["file_search_call.results"]}, "include[0]"),
    (RESPONSES, {"text": {"verbosity": "high"}}, "text.verbosity"),
    (RESPONSES, {"reasoning": {"effort": "high"}}, "reasoning.effort"),
    (RESPONSES, {"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    (RESPONSES, {"input": [{"type": "message", "role": "robot", "content": "x"}]}, "input[0].role"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "x"}]}]}, "input[0].content[0].type"),
    (RESPONSES, {"input": [{"type": "reasoning", "summary": [{"text": "x"}]}]}, "input[0].summary[0].type"),
    (RESPONSES, {"tool_choice": {"type": "function"}}, "tool_choice.name"),
]


def told(http: httpx.Client, path: str, fields: dict[str, Any]) -> Any:
    """What an answer says; it is greedy, so that it says the same each time."""
    answer = http.post(path, json={**GOOD[path], **fields})
    assert answer.status_code == 200, f"{path} with {fields}: {answer.text}"
    body = answer.json()
    match path:
        case "/v1/responses":
            return body["output"][0]["content"][0]["text"]
        case "/generate":
            return body["answers"][0]["text"]
        case _:
            return body["choices"]


@pytest.mark.parametrize("path", GOOD)
def test_neutral_values_change_nothing(http: httpx.Client, path: str) -> None:
    plain = told(http, path, {})
    assert told(http, path, LABELS) == plain
    for place in range(2):  # the first values of all fields at once, then the second ones
        fields = {name: values[min(place, len(values) - 1)] for name, values in REQUEST.items()}
        if path == CHAT:
            fields["chat_template_kwargs"] = {"enable_thinking": False}
        assert told(http, path, fields) == plain


def test_routes_take_what_asks_for_nothing_in_their_own_words(http: httpx.Client) -> None:
    plain = told(http, CHAT, {})
    for effort in ("none", "medium"):
        assert told(http, CHAT, {"reasoning_effort": effort}) == plain
    said = told(http, RESPONSES, {})
    for fields in (
        {"store": True},
        {"include": ["reasoning.encrypted_content"]},
        {"text": {"verbosity": "medium"}},
        {"reasoning": {"effort": "medium", "summary": "auto"}},
        {"top_logprobs": 0},
    ):
        assert told(http, RESPONSES, fields) == said
    hidden = {"stream": True, "stream_options": {"include_obfuscation": False}}
    for path in (CHAT, RESPONSES):
        assert http.post(path, json={**GOOD[path], **hidden}).status_code == 200


@pytest.mark.parametrize(("path", "fields", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_would_change_the_answer_is_refused_by_its_full_path(
    http: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = http.post(path, json={**GOOD[path], **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert "literal[" not in error["message"] and "NamedTool" not in error["message"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_continuous_usage_is_told_with_every_event(http: httpx.Client, path: str) -> None:
    """It was accepted and ignored; guidellm asks for it."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**GOOD[path], "n": 2, "stream": True, "stream_options": options}
    events = list(events_of(http.post(path, json=body).text))
    made = [0, 0]
    for event in events[:-1]:
        used, index = event["usage"], event["choices"][0]["index"]
        assert used["completion_tokens"] >= made[index]
        assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
        made[index] = used["completion_tokens"]
    last = events[-1]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == sum(made) == 8
    assert all(event["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"] for event in events)


def events_of(text: str) -> Iterator[dict[str, Any]]:
    for line in text.split("\n"):
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))
