"""/v1/completions: a prompt can be scored without an answer, and each token's place in the text is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.settings import EngineSettings

if TYPE_CHECKING:
    import httpx2 as httpx

    from tests.server.conftest import Running

PATH = "/v1/completions"
PROMPTS = ("Once upon a time, there", " two  spaces", "naïve café 你好 😀")


def choices(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    answer = http.post(PATH, json={"temperature": 0, "ignore_eos": True, **body})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"])


@pytest.fixture(scope="module")
def with_bos(start: Any, stories260k: Any) -> Iterator[Running]:
    """A server of a model whose tokenizer puts BOS first and writes rare characters as bytes."""

    def load() -> AsyncLLM:
        return AsyncLLM(stories260k, engine=EngineSettings(kv_blocks=64))

    with start(load=load) as one:
        with one.http() as http:
            while http.get("/health").status_code != 200:
                pass
        yield one
        one.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_without_an_answer(running: Running, stream: bool) -> None:
    """As lm-eval asks: echo, and no token more. What it says of the prompt is what an answer's echo says."""
    asked = {"prompt": list(PROMPTS), "echo": True, "logprobs": 2}
    with running.http() as http:
        longer = choices(http, max_tokens=3, **asked)
        answer = http.post(PATH, json={"max_tokens": 0, "stream": stream, **asked})
        assert answer.status_code == 200, answer.text
        if stream:
            lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: {")]
            events = [choice for line in lines for choice in json.loads(line)["choices"]]
            scored = [joined([event for event in events if event["index"] == i]) for i in range(3)]
        else:
            body = answer.json()
            assert body["usage"]["completion_tokens"] == 0
            assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] > 0
            scored = body["choices"]
    for prompt, one, other in zip(PROMPTS, scored, longer, strict=True):
        assert one["text"] == prompt and one["finish_reason"] == "length"
        count = len(other["logprobs"]["tokens"]) - 3
        for name, values in one["logprobs"].items():
            assert values == other["logprobs"][name][:count], name
        assert one["logprobs"]["token_logprobs"][0] is None


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """A streamed choice as a whole one."""
    told: dict[str, list[Any]] = {}
    for event in events:
        for name, values in event["logprobs"].items():
            told.setdefault(name, []).extend(values)
    text = "".join(event["text"] for event in events)
    return {"text": text, "logprobs": told, "finish_reason": events[-1]["finish_reason"]}


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_places_are_right_behind_a_bos_and_in_characters_of_several_bytes(
    with_bos: Running, prompt: str, as_ids: bool
) -> None:
    """text[offset[i]:offset[i + 1]] is what token i adds; BOS has no text where the prompt has none."""
    tokenizer = with_bos.engine.llm.tokenizer
    ids = tokenizer.encode(prompt)
    with with_bos.http() as http:
        given = ids if as_ids else prompt
        (choice,) = choices(http, prompt=given, echo=True, logprobs=0, max_tokens=6)
        (alone,) = choices(http, prompt=given, logprobs=0, max_tokens=6)
    text, told = choice["text"], choice["logprobs"]
    places = told["text_offset"]
    assert len(places) == len(ids) + 6 and places == sorted(places)
    pieces = [text[a:b] for a, b in zip(places, [*places[1:], len(text)], strict=True)]
    assert "".join(pieces) == text
    assert pieces[0] == ("<s>" if as_ids else "")
    before = text.removesuffix(alone["text"])
    assert places[len(ids)] == len(before), "the answer begins behind the prompt"
    assert alone["logprobs"]["text_offset"] == [place - len(before) for place in places[len(ids) :]]
    for token, piece in zip(told["tokens"], pieces, strict=True):
        is_whole = not token.startswith("bytes:") and token != "<s>"
        assert not is_whole or token.strip() == piece.strip(), (token, piece)


def test_a_prompt_of_one_token_can_be_scored(http: httpx.Client) -> None:
    (choice,) = choices(http, prompt=[5], echo=True, logprobs=1, max_tokens=0)
    assert choice["logprobs"]["token_logprobs"] == [None] and choice["logprobs"]["text_offset"] == [0]
