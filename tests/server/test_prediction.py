"""What a client says it expects as the answer changes how fast it comes, and nothing else."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import openai
import pytest

ASK: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What is paged attention?"}],
    "max_tokens": 48,
    "temperature": 0,
}


def told(answer: Any) -> tuple[str, str]:
    (choice,) = answer.choices
    return choice.message.content, choice.finish_reason


def test_a_predicted_answer_is_the_same_answer(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**ASK, extra_body={"speculate": False})
    assert plain.usage is not None and plain.usage.completion_tokens_details is not None
    assert plain.usage.completion_tokens_details.accepted_prediction_tokens == 0
    text = plain.choices[0].message.content or ""
    for content in (text, text.replace("block", "page"), "Something else altogether, word by word.", ""):
        answer = client.chat.completions.create(**ASK, prediction={"type": "content", "content": content})
        assert told(answer) == told(plain)
        assert answer.usage is not None
        details = answer.usage.completion_tokens_details
        assert details is not None and details.accepted_prediction_tokens is not None
        if content == text:
            assert details.accepted_prediction_tokens > 4, "the whole answer was given"


def test_a_stream_of_a_predicted_answer_joins_to_it(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2)
    text = plain.choices[0].message.content or ""
    parts, tokens = [], []
    events = client.chat.completions.create(
        **ASK,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        prediction={"type": "content", "content": [{"type": "text", "text": text}]},
    )
    for event in events:
        (choice,) = event.choices
        parts.append(choice.delta.content or "")
        if choice.logprobs is not None:
            tokens += choice.logprobs.content or []
    assert "".join(parts) == text
    assert plain.choices[0].logprobs is not None and tokens == plain.choices[0].logprobs.content


@pytest.mark.parametrize(
    ("prediction", "param"),
    [("text", "prediction"), ({"type": "image", "content": "x"}, "prediction.type")],
)
def test_what_is_no_prediction_is_refused_by_its_name(
    http: httpx.Client, prediction: object, param: str
) -> None:
    answer = http.post("/v1/chat/completions", json={**ASK, "prediction": prediction})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_guesses_are_counted(http: httpx.Client) -> None:
    def counts() -> list[float]:
        lines = http.get("/metrics").text.splitlines()
        told = [line for line in lines if "spec_decode_num" in line and 'source="prediction"' in line]
        return [float(line.rsplit(" ", 1)[1]) for line in told]

    before = counts()
    text = http.post("/v1/chat/completions", json=ASK).json()["choices"][0]["message"]["content"]
    asked = {**ASK, "prediction": {"type": "content", "content": text}}
    details = http.post("/v1/chat/completions", json=asked).json()["usage"]["completion_tokens_details"]
    accepted, drafted = sorted(new - old for new, old in zip(counts(), before, strict=True))
    assert accepted >= details["accepted_prediction_tokens"] > 0
    assert drafted >= details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"]
