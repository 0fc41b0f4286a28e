"""The real openai client, which validates every response strictly, against a running server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tiny_llm import LLM, SamplingParams

if TYPE_CHECKING:
    from tests.server.conftest import Running

ASK = [{"role": "user", "content": "What is a KV cache?"}]
PROMPT = "<|im_start|>user\nWhat is a KV cache?<|im_end|>\n<|im_start|>assistant\n"
GREEDY = {"temperature": 0, "model": "demo"}
ON = {**GREEDY, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def alone(running: Running) -> LLM:
    """The same model, asked without a server."""
    return LLM("demo")


@pytest.fixture
def lax(running: Running) -> Iterator[openai.OpenAI]:
    """It takes what the strict one minds: a finish_reason of null, a first token without log-probability."""
    with running.openai(strict=False) as one:
        yield one


def text_of(stream: openai.Stream) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_models_are_listed_and_shown(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "tiny_llm"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("dem")
    assert caught.value.code == "model_not_found" and "Did you mean 'demo'?" in caught.value.message


def test_chat_says_what_the_model_says(client: openai.OpenAI, alone: LLM) -> None:
    expected = alone.chat(ASK, SamplingParams(max_tokens=64))
    got = client.chat.completions.create(messages=ASK, max_tokens=64, **GREEDY)
    assert got.choices[0].message.content == expected.text
    assert got.choices[0].finish_reason == "stop" and got.choices[0].message.role == "assistant"
    assert got.usage is not None and got.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert got.usage.completion_tokens == len(expected.token_ids)
    assert got.id.startswith("chatcmpl-") and got.object == "chat.completion"


def test_a_stream_joins_to_the_whole_and_ends_with_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=ASK, max_tokens=64, **GREEDY)
    stream = client.chat.completions.create(
        messages=ASK, max_tokens=64, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_helper_finds_the_whole(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(messages=ASK, max_tokens=99, **GREEDY) as stream:
        final = stream.get_final_completion()
    whole = client.chat.completions.create(messages=ASK, max_tokens=99, **GREEDY)
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_completions_go_on_with_a_text_or_with_ids(client: openai.OpenAI, alone: LLM) -> None:
    expected = alone.generate(PROMPT, SamplingParams(max_tokens=12))[0]
    by_text = client.completions.create(prompt=PROMPT, max_tokens=12, **GREEDY)
    by_ids = client.completions.create(prompt=alone.tokenizer.encode(PROMPT), max_tokens=12, **GREEDY)
    assert by_text.choices[0].text == by_ids.choices[0].text == expected.text
    short = client.completions.create(prompt=PROMPT, **GREEDY, extra_body={"ignore_eos": True})
    assert short.usage is not None and short.usage.completion_tokens == 16, "OpenAI's default"


def test_many_prompts_and_answers_are_in_order(lax: openai.OpenAI, client: openai.OpenAI) -> None:
    prompts = ["One two", "Three four", "Five six"]
    got = client.completions.create(prompt=prompts, n=2, max_tokens=8, seed=5, model="demo")
    assert [choice.index for choice in got.choices] == list(range(6))
    alone = [client.completions.create(prompt=p, n=2, max_tokens=8, seed=5, model="demo") for p in prompts]
    assert [c.text for c in got.choices] == [c.text for one in alone for c in one.choices]
    assert got.usage is not None
    assert got.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone if one.usage)
    stream = lax.completions.create(
        prompt=prompts, n=2, max_tokens=8, seed=5, model="demo", stream=True, extra_body={"echo": True}
    )
    texts = [""] * 6
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [prompts[i // 2] + choice.text for i, choice in enumerate(got.choices)]


def test_a_seed_repeats_and_n_differs(client: openai.OpenAI) -> None:
    ask = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 20, "model": "demo"}
    first, again = (client.chat.completions.create(seed=7, n=3, temperature=1.5, **ask) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    negative = client.chat.completions.create(seed=-1, **ask)
    assert negative.choices[0].message.content


def test_echo_and_stop(lax: openai.OpenAI, client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt=PROMPT, max_tokens=40, echo=True, **ON)
    assert whole.choices[0].text.startswith(PROMPT)
    answer = whole.choices[0].text.removeprefix(PROMPT)
    stop = answer[6:9]
    cut = client.completions.create(prompt=PROMPT, max_tokens=40, stop=stop, **ON)
    assert cut.choices[0].text == answer[: answer.index(stop)] and cut.choices[0].finish_reason == "stop"
    stream = lax.completions.create(prompt=PROMPT, max_tokens=40, stop=[stop], stream=True, **ON)
    assert "".join(chunk.choices[0].text for chunk in stream) == cut.choices[0].text, "no part of it leaks"


def test_chat_logprobs_are_of_each_token(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        messages=ASK, max_tokens=6, logprobs=True, top_logprobs=3, **GREEDY
    ).choices[0]
    assert got.logprobs is not None and got.logprobs.content is not None
    assert len(got.logprobs.content) == 6
    for entry in got.logprobs.content:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token, "greedy"
        assert entry.logprob <= 0 and bytes(entry.bytes or []).decode("utf-8", "replace") == entry.token
    text = b"".join(bytes(entry.bytes or []) for entry in got.logprobs.content).decode()
    assert text == got.message.content
    stream = client.chat.completions.create(
        messages=ASK, max_tokens=6, logprobs=True, top_logprobs=3, stream=True, **GREEDY
    )
    parts = [c.choices[0].logprobs.content or [] for c in stream if c.choices and c.choices[0].logprobs]
    assert [e.token for part in parts for e in part] == [e.token for e in got.logprobs.content]


@pytest.mark.parametrize(("most", "end_tokens"), [(6, 0), (64, 1)])
def test_usage_counts_what_was_made_and_logprobs_tell_what_was_said(
    client: openai.OpenAI, most: int, end_tokens: int
) -> None:
    """The token that ends an answer took a step and a place of max_tokens; it is no part of the text."""
    asked: dict[str, Any] = {"messages": ASK, "max_tokens": most, "logprobs": True, **GREEDY}
    got = client.chat.completions.create(**asked)
    logprobs = got.choices[0].logprobs
    assert got.choices[0].finish_reason == ("stop" if end_tokens else "length")
    assert got.usage is not None and logprobs is not None and logprobs.content is not None
    assert got.usage.completion_tokens == len(logprobs.content) + end_tokens
    shorter = client.chat.completions.create(**{**asked, "max_tokens": len(logprobs.content)})
    assert shorter.choices[0].finish_reason == "length", "no place for the end"


@pytest.mark.parametrize("stop", ["keeps", "cache keeps", "ep"])
def test_logprobs_agree_with_the_text_that_a_stop_string_cuts(client: openai.OpenAI, stop: str) -> None:
    """Text and tokens agree, streamed or not: a stop string's tokens are in neither, nor is the end token."""
    asked = {"max_tokens": 60, "logprobs": True, "stop": [stop], **GREEDY}
    got = client.chat.completions.create(messages=ASK, **asked).choices[0]
    assert got.finish_reason == "stop" and got.logprobs is not None and got.logprobs.content
    tokens = [entry.token for entry in got.logprobs.content]
    said = got.message.content or ""
    assert "".join(tokens).startswith(said) and len("".join(tokens[:-1])) < len(said), (tokens, said)
    streamed: list[str] = []
    for event in client.chat.completions.create(messages=ASK, stream=True, **asked):
        choice = event.choices[0]
        streamed += [e.token for e in (choice.logprobs and choice.logprobs.content) or []]
    assert streamed == tokens
    plain = {**asked, "logprobs": 1, "prompt": PROMPT, "stop": None}
    whole = client.completions.create(**plain).choices[0]
    assert whole.finish_reason == "stop" and whole.logprobs is not None
    assert "".join(whole.logprobs.tokens or []) == whole.text, "the token that ends an answer says nothing"


def test_completion_logprobs_have_offsets(client: openai.OpenAI) -> None:
    got = client.completions.create(prompt=PROMPT, max_tokens=6, logprobs=2, **ON).choices[0]
    told = got.logprobs
    assert told is not None and told.tokens and told.text_offset and told.token_logprobs and told.top_logprobs
    assert "".join(told.tokens) == got.text and told.text_offset[0] == 0
    assert all(len(row) == 2 for row in told.top_logprobs)
    assert told.text_offset[1] == len(told.tokens[0])


def test_an_echo_tells_how_likely_the_prompt_was(
    lax: openai.OpenAI, client: openai.OpenAI, alone: LLM
) -> None:
    ids = alone.tokenizer.encode(PROMPT * 9)  # of several chunks and blocks
    asked = {"prompt": ids, "max_tokens": 3, "logprobs": 2, "echo": True, **ON}
    got = lax.completions.create(**asked).choices[0]
    told = got.logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs
    assert len(told.tokens) == len(ids) + 3 and "".join(told.tokens) == got.text
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert told.text_offset is not None and told.text_offset[-1] == len(got.text) - len(told.tokens[-1])
    for place in (1, 17, len(ids) - 1):  # what a request that ends there says of its next token
        before = client.completions.create(prompt=ids[:place], max_tokens=1, logprobs=20, **ON).choices[0]
        assert before.logprobs is not None and before.logprobs.top_logprobs is not None
        likely = before.logprobs.top_logprobs[0]
        both = likely.keys() & told.top_logprobs[place].keys()
        assert len(both) >= 2 and all(likely[token] == told.top_logprobs[place][token] for token in both)
    with ThreadPoolExecutor(6) as clients:
        many = clients.map(lambda _: lax.completions.create(**asked).choices[0].logprobs, range(6))
        assert all(one == told for one in many), "what else is in the batch changes nothing"
    parts = [c.choices[0] for c in lax.completions.create(stream=True, **asked)]
    joined = [value for part in parts for value in (part.logprobs.token_logprobs or [])]
    assert joined == told.token_logprobs and "".join(part.text for part in parts) == got.text


def test_what_changes_the_choice_does(client: openai.OpenAI, alone: LLM) -> None:
    banned = client.chat.completions.create(messages=ASK, max_tokens=4, logit_bias={"7": 100}, **GREEDY)
    assert banned.choices[0].message.content == alone.tokenizer.decode([7] * 4)
    extra = {"min_tokens": 30, "repetition_penalty": 1.3, "top_k": 5, "min_p": 0.1}
    longer = client.chat.completions.create(messages=ASK, max_tokens=40, extra_body=extra, **GREEDY)
    assert longer.usage is not None and longer.usage.completion_tokens >= 30
    on = client.chat.completions.create(
        messages=ASK, max_tokens=99, extra_body={"ignore_eos": True}, **GREEDY
    )
    assert on.usage is not None and on.usage.completion_tokens == 99


def test_the_second_turn_finds_the_first_in_the_cache(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "What is a block table? Say it in many words, please, and slowly."}]
    client.chat.completions.create(messages=long, max_tokens=4, **GREEDY)
    again = client.chat.completions.create(messages=long, max_tokens=4, **GREEDY)
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) >= 16
    salted = client.chat.completions.create(
        messages=long, max_tokens=4, extra_body={"cache_salt": "mine"}, **GREEDY
    )
    assert salted.usage is not None and salted.usage.prompt_tokens_details is not None
    assert salted.usage.prompt_tokens_details.cached_tokens == 0, "another salt shares nothing"


@pytest.mark.parametrize(
    ("kind", "status", "options"),
    [
        (openai.BadRequestError, 400, {"temperature": -1}),
        (openai.NotFoundError, 404, {"model": "gpt-4"}),
        (openai.BadRequestError, 400, {"messages": [{"role": "user", "content": "word " * 5000}]}),
    ],
)
def test_errors_are_the_clients_typed_exceptions(
    client: openai.OpenAI, kind: type[openai.APIStatusError], status: int, options: dict[str, object]
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**({"messages": ASK, "model": "demo"} | options))
    assert caught.value.status_code == status and caught.value.type == "invalid_request_error"


def test_a_context_that_is_too_long_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt=[1] * 1024, **GREEDY)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    assert "1024 tokens" in caught.value.message


def test_our_own_routes(running: Running, alone: LLM) -> None:
    with running.http() as http:
        told = http.post("/tokenize", json={"prompt": PROMPT}).json()
        assert told == {
            "count": len(told["tokens"]),
            "max_model_len": 1024,
            "tokens": alone.tokenizer.encode(PROMPT),
        }
        assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": PROMPT}
        info = http.get("/tokenizer_info").json()  # lm-eval's tokenizer_backend=remote
        assert info == {
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "chat_template": alone.tokenizer.chat_template,
            "model_max_length": 1024,
        }
        chat = http.post("/tokenize", json={"messages": ASK}).json()["tokens"]
        assert chat == alone.chat_prompt(ASK)
        expected = alone.generate(PROMPT, SamplingParams(max_tokens=9, logprobs=1))[0]
        got = http.post("/generate", json={"prompt": PROMPT, "max_tokens": 9, "logprobs": 1}).json()
        assert (
            got["answers"][0]["token_ids"] == expected.token_ids
            and got["answers"][0]["text"] == expected.text
        )
        with http.stream(
            "POST", "/generate", json={"prompt": PROMPT, "max_tokens": 9, "stream": True, "ignore_eos": True}
        ) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and len(lines) == 10


def test_what_tells_about_the_server(running: Running) -> None:
    with running.http() as http:
        assert http.get("/health").json() == {"status": "ready", "live": True, "ready": True}
        assert http.get("/version").json()["version"]
        assert http.get("/docs").status_code == 200
        paths = http.get("/openapi.json").json()["paths"]
        assert {"/v1/chat/completions", "/v1/completions", "/tokenize"} <= paths.keys()
        before = figures(http.get("/metrics").text)
        used = http.post("/v1/completions", json={"prompt": "Count me.", "max_tokens": 5, "n": 2}).json()[
            "usage"
        ]
        after = figures(http.get("/metrics").text)
    grown = {name: after[name] - before[name] for name in before if name in after}
    assert grown["tiny_llm_prompt_tokens_total"] == used["prompt_tokens"]
    assert grown["tiny_llm_generation_tokens_total"] == used["completion_tokens"]
    assert grown["tiny_llm_time_to_first_token_seconds_count"] == 2
    assert after["tiny_llm_num_requests_running"] == 0


def figures(text: str) -> dict[str, float]:
    """Each figure of an exposition, without its labels."""
    pairs = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    return {name.split("{")[0]: float(value) for name, value in pairs if "le=" not in name}
