"""Features that crash only together (CVE-2026-44223): every pair of them in one request, all at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest

from tiny_llm.scheduler.drafts import Worth

if TYPE_CHECKING:
    import httpx2 as httpx

    from tests.server.conftest import Running

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
NOTHING = {"type": "object", "properties": {}}
LOOKUP = {"type": "function", "function": {"name": "lookup", "parameters": NOTHING}}
FEATURES: Mapping[str, dict[str, Any]] = {
    "stream": {"stream": True},
    "usage": {"stream": True, "stream_options": {"include_usage": True}},
    "usage so far": {"stream": True, "stream_options": {"continuous_usage_stats": True}},
    "n": {"n": 3},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "stop": {"stop": ["e"]},
    "stop ids": {"stop_token_ids": [5]},
    "greedy": {"temperature": 0},
    "filters": {"top_k": 7, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 1, "frequency_penalty": -1},
    "bias": {"logit_bias": {"7": 3, "2045": -100}},
    "min_tokens": {"min_tokens": 4},
    "ignore_eos": {"ignore_eos": True},
    "form": {"response_format": {"type": "json_object"}},
    "tools": {"tools": [LOOKUP]},
    "demand": {"tools": [LOOKUP], "tool_choice": "required"},
    "one call": {"tools": [LOOKUP], "parallel_tool_calls": False},
    "priority": {"priority": 5},
    "salt": {"cache_salt": "s"},
}
REFUSED = {frozenset((form, late)) for form in ("form", "demand") for late in ("min_tokens", "ignore_eos")}
"""An answer ends where its form does. (A form beside a demanded call binds messages, and there is none.)"""


def ask(http: httpx.Client, fields: dict[str, Any]) -> tuple[str, ...]:
    """What came of a request: its finish reasons and texts, or the status of its refusal."""
    body = {"messages": [{"role": "user", "content": "What is a KV cache?"}], "max_tokens": 12, "seed": 1}
    answer = http.post(CHAT, json=body | fields)
    if answer.status_code != 200:
        return (str(answer.status_code),)
    texts = [""] * fields.get("n", 1)
    if not fields.get("stream"):
        choices = answer.json()["choices"]
    else:
        assert answer.text.endswith("data: [DONE]\n\n")
        events = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: {")]
        choices = [choice for event in events for choice in event["choices"]]
    for choice in choices:
        texts[choice["index"]] += choice.get("message", choice.get("delta")).get("content") or ""
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert len(reasons) == len(texts)
    return " ".join(sorted(set(reasons))), *texts


def test_every_pair_of_features_works_together_and_the_engine_lives_on(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is guessed is checked, as if it paid; then each request alone, without guesses."""
    monkeypatch.setattr(Worth, "length", lambda self, share, most: most)
    with running.http() as http, ThreadPoolExecutor(16) as clients:
        _, text = ask(http, FEATURES["greedy"])
        features = {**FEATURES, "prediction": {"prediction": {"type": "content", "content": text}}}
        pairs = list(combinations(features, 2))
        fields = [features[a] | features[b] for a, b in pairs]
        told = dict(zip(pairs, clients.map(lambda one: ask(http, one), fields), strict=True))
        again = dict(zip(pairs, [ask(http, one | {"speculate": False}) for one in fields], strict=True))
    for pair, (what, *_) in told.items():
        expected = {"400"} if frozenset(pair) in REFUSED else {"stop", "length", "tool_calls"}
        assert set(what.split()) <= expected, f"{pair}: {what}"
    assert told == again, "what else is in the batch changes nothing, nor what is guessed"
    counts = running.engine.llm.engine.stats().accepted_tokens
    assert counts["prediction"] > 100 and counts["ngram"], "hardly a guess was checked"
    running.wait_until_idle()
    assert running.engine.llm.engine.healthy and not running.engine.restarts
