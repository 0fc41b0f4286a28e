"""/v1/embeddings: OpenAI's client and LangChain's get the library's vectors; what cannot be is refused."""

from __future__ import annotations

import base64
import importlib
import json
import socket
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tiny_llm import LLM
from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.server.settings import ServerSettings

if TYPE_CHECKING:
    import httpx2 as httpx

    from tests.server.conftest import Running

TEXTS = ["What is a KV cache?", "a fox", "Paged attention keeps the cache in blocks. " * 6]


@pytest.fixture(scope="module")
def alone(demo: Path) -> LLM:
    """The same model, used as a library."""
    return LLM(demo, engine=EngineSettings(kv_blocks=256))


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    """Not strict: what it asks for by itself, base64, is not what its own type says."""
    with running.openai(strict=False) as one:
        yield one


def test_openai_s_client_gets_the_library_s_vectors(client: openai.OpenAI, alone: LLM) -> None:
    expected = alone.embed(TEXTS)
    by_bytes = client.embeddings.create(model="demo", input=TEXTS)  # it asks for base64, and decodes
    by_numbers = client.embeddings.create(model="demo", input=TEXTS, encoding_format="float")
    for got in (by_bytes, by_numbers):
        as_floats = [array("f", one.embedding).tolist() for one in got.data]
        assert as_floats == [one.vector for one in expected], "every bit comes through"
        assert [one.index for one in got.data] == [0, 1, 2] and got.model == "demo"
        tokens = sum(one.prompt_tokens for one in expected)
        assert (got.usage.prompt_tokens, got.usage.total_tokens) == (tokens, tokens)


def test_bytes_are_little_endian_floats(http: httpx.Client, alone: LLM) -> None:
    told = http.post("/v1/embeddings", json={"input": "a fox", "encoding_format": "base64"}).json()
    got = array("f", base64.b64decode(told["data"][0]["embedding"]))
    assert got.tolist() == alone.embed("a fox")[0].vector


def test_input_is_text_or_ids_alone_or_in_a_list(client: openai.OpenAI, alone: LLM) -> None:
    ids = [alone.tokenizer.encode(text) for text in TEXTS]
    expected = [one.vector for one in alone.embed(TEXTS)]
    for given, wanted in ((TEXTS[0], expected[:1]), (ids[0], expected[:1]), (ids, expected)):
        got = client.embeddings.create(model="demo", input=given)  # type: ignore[arg-type]
        assert [one.embedding for one in got.data] == wanted


def test_dimensions_and_instructions(client: openai.OpenAI, alone: LLM) -> None:
    got = client.embeddings.create(model="demo", input="a fox", dimensions=16)
    assert got.data[0].embedding == alone.embed("a fox", dimensions=16)[0].vector
    told = client.embeddings.create(model="demo", input="a fox", extra_body={"instruction": "Find: "})
    assert told.data[0].embedding == alone.embed("Find: a fox")[0].vector


def test_langchain(running: Running, alone: LLM) -> None:
    """Without its check of lengths, which reads texts by OpenAI's tokenizer and sends its ids."""
    langchain = importlib.import_module("langchain_openai")
    model = langchain.OpenAIEmbeddings(
        base_url=f"{running.url}/v1",
        api_key="none",
        model="demo",
        check_embedding_ctx_length=False,
        max_retries=0,
    )
    expected = [one.vector for one in alone.embed(TEXTS)]
    assert model.embed_documents(TEXTS) == expected
    assert model.embed_query(TEXTS[0]) == expected[0]


def test_many_texts_come_in_their_order(client: openai.OpenAI, alone: LLM) -> None:
    texts = [f"a fox {n}" for n in range(90)]
    got = client.embeddings.create(model="demo", input=texts)
    assert [one.embedding for one in got.data] == [one.vector for one in alone.embed(texts)]


@pytest.mark.parametrize(
    ("body", "param", "what"),
    [
        ({}, "input", "input is missing"),
        ({"input": ""}, "input", "A text is empty"),
        ({"input": []}, "input", "not empty"),
        ({"input": ["a", ""]}, "input[1]", "A text is empty"),
        ({"input": [[1], []]}, "input[1]", "The prompt is empty"),
        ({"input": [5, 10**6]}, "input", "is not in the vocabulary"),
        ({"input": ["a", 5]}, "input[1]", "all must be strings, or lists of ids"),
        ({"input": ["a"] * 2049}, "input", "has 2049 texts, but may have at most 2048"),
        ({"input": "a", "dimensions": 257}, "dimensions", "this model's vectors have 256"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "prompt": "query"}, "prompt", "has no prompt 'query'"),
        ({"input": [1], "instruction": "x"}, "instruction", "into your token ids"),
        ({"input": "a", "temperature": 1}, "temperature", "is not supported here"),
        ({"input": ["a", "a " * 3000]}, "input[1]", "maximum context length is"),
    ],
)
def test_what_cannot_be_is_a_400_that_says_why(
    http: httpx.Client, body: dict[str, Any], param: str, what: str
) -> None:
    got = http.post("/v1/embeddings", json=body)
    error = got.json()["error"]
    assert (got.status_code, error["param"]) == (400, param) and what in error["message"], error


def test_another_model_is_not_here(http: httpx.Client) -> None:
    assert http.post("/v1/embeddings", json={"input": "a", "model": "other"}).status_code == 404


def test_a_model_without_a_head_embeds_and_does_not_answer(start: Any) -> None:
    folder = Path(__file__).resolve().parents[1] / "golden_embeddings" / "qwen3_last"
    asked = json.loads((folder / "vectors.json").read_text())
    query = next(one for one in asked if one.get("prompt") == "query")
    with start(load=lambda: AsyncLLM(folder, dtype="float32")) as running, running.http() as http:
        while http.get("/health").status_code != 200:
            pass
        got = http.post("/v1/embeddings", json={"input": query["text"], "prompt": "query"}).json()
        vector = got["data"][0]["embedding"]
        assert max(abs(a - b) for a, b in zip(vector, query["vector"], strict=True)) < 1e-5
        refused = http.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 400 and "without its head" in refused.json()["error"]["message"]


def test_who_hangs_up_stops_it(running: Running, until: Callable[..., None]) -> None:
    body = json.dumps({"input": ["a story of a fox " * 60] * 500}).encode()
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    address = ("127.0.0.1", int(running.url.rsplit(":", 1)[1]))
    cancelled = running.engine.llm.engine.totals.ends["cancelled"]
    with socket.create_connection(address, timeout=60) as one:
        one.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: len(running.engine.llm.engine) > 0, "it to begin")
    running.wait_until_idle()
    assert running.engine.llm.engine.totals.ends["cancelled"] > cancelled


def test_a_full_queue_is_a_429(start: Any) -> None:
    with start(scheduler=SchedulerSettings(max_num_seqs=1, max_queued_requests=2)) as running:
        with running.http() as http:
            got = http.post("/v1/embeddings", json={"input": ["a fox"] * 40})
            assert got.status_code == 429 and got.headers["retry-after"]
            assert http.post("/v1/embeddings", json={"input": "a fox"}).status_code == 200
        running.wait_until_idle()


def test_metrics_count_texts(running: Running, http: httpx.Client) -> None:
    def figures() -> dict[str, float]:
        lines = [line.rpartition(" ") for line in http.get("/metrics").text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, _, value in lines}

    before = figures()
    told = http.post("/v1/embeddings", json={"input": ["a bear of figures", "a wolf of figures"]}).json()
    after = figures()
    read = 'tiny_llm_prompt_tokens_total{model_name="demo"}'
    ended = 'tiny_llm_request_success_total{finished_reason="stop",model_name="demo"}'
    assert after[read] - before[read] == told["usage"]["prompt_tokens"]
    assert after[ended] - before.get(ended, 0) == 2


def test_keys_share_no_prefix(start: Any) -> None:
    with start(ServerSettings(api_keys=("one", "two"))) as running, running.http() as http:
        text = {"input": "Paged attention keeps the cache in blocks. " * 8}
        hits = []
        for key in ("one", "two", "one"):
            before = running.engine.llm.engine.stats().prefix_hit_tokens
            assert http.post(
                "/v1/embeddings", json=text, headers={"Authorization": f"Bearer {key}"}
            ).is_success
            hits.append(running.engine.llm.engine.stats().prefix_hit_tokens - before)
        assert hits[:2] == [0, 0] and hits[2] > 50
        running.wait_until_idle()
