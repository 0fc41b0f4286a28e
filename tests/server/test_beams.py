"""A beam search is asked for by vLLM's fields, and finds what the library's search finds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tiny_llm import LLM, BeamParams

if TYPE_CHECKING:
    import httpx2 as httpx

SEARCH: dict[str, Any] = {"use_beam_search": True, "length_penalty": 1.4, "early_stopping": "never"}
PROMPT = "A block table says"


@pytest.mark.slow
def test_a_completion_by_beams_is_the_librarys(client: openai.OpenAI, demo: Path) -> None:
    params = BeamParams(width=3, n=3, max_tokens=12, length_penalty=1.4, early_stopping="never")
    (expected,) = LLM(demo).beam_search(PROMPT, params)
    asked: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "n": 3}
    for temperature in (0, 1, openai.omit):
        answer = client.completions.create(**asked, temperature=temperature, extra_body=SEARCH)
        assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    assert [choice.finish_reason for choice in answer.choices] == [one.finish_reason for one in expected]
    texts = ["", "", ""]
    for event in client.completions.create(**asked, stream=True, extra_body=SEARCH):
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == [one.text for one in expected]


@pytest.mark.slow
def test_a_chat_by_beams(client: openai.OpenAI) -> None:
    """Whole and streamed, to a schema, with log-probabilities."""
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "s", "schema": {"enum": ["yes", "no", "maybe"]}},
    }
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Is it so?"}],
        "n": 3,
        "logprobs": True,
        "response_format": form,
        "extra_body": {"use_beam_search": True},
    }
    answer = client.chat.completions.create(**asked)
    said = [choice.message.content for choice in answer.choices]
    assert {*said} <= {'"maybe"', '"no"', '"yes"'} and len({*said}) > 1
    assert all(choice.logprobs and choice.logprobs.content for choice in answer.choices)
    streamed = ["", "", ""]
    for event in client.chat.completions.create(**asked, stream=True):
        streamed[event.choices[0].index] += event.choices[0].delta.content or ""
    assert streamed == said


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"top_p": 0.5}, "top_p"),
        ({"top_k": 5}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"best_of": 4}, "best_of"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"use_beam_search": False, "length_penalty": 2}, "length_penalty"),
        ({"use_beam_search": False, "early_stopping": True}, "early_stopping"),
    ],
)
def test_what_a_search_has_no_use_for_is_refused(
    http: httpx.Client, more: dict[str, Any], param: str
) -> None:
    answer = http.post("/v1/completions", json={"prompt": "A", "use_beam_search": True, **more})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
