"""What we say of ourselves, judged by others: our OpenAPI by schemathesis, our metrics by Prometheus."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from prometheus_client.parser import text_string_to_metric_families
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.settings import EngineSettings

if TYPE_CHECKING:
    import httpx2 as httpx

    from tests.server.conftest import Running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXAMPLES = 16
KINDS = {"counter", "gauge", "histogram"}


@pytest.fixture(scope="module")
def short(start: Any, demo: Path) -> Iterator[Running]:
    """A server whose answers end soon: a context of 64 tokens."""
    with start(load=lambda: AsyncLLM(demo, max_context=64, engine=EngineSettings(kv_blocks=512))) as one:
        with one.http() as http:
            while http.get("/health").status_code != 200:
                pass
        yield one
        one.wait_until_idle()


@pytest.mark.slow
def test_whatever_our_openapi_allows_or_not_gets_an_answer_that_it_tells_of(short: Running) -> None:
    with short.http() as http:
        told = http.get("/openapi.json").json()
    for body in told["components"]["schemas"].values():
        if "model" in body["properties"]:  # else most requests would end there
            body["properties"]["model"] = {"const": "demo"}
    schema = schemathesis.openapi.from_dict(told)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 11
    seen: Counter[int] = Counter()
    for operation in operations:
        mode = schemathesis.GenerationMode
        for kind in (mode.POSITIVE, mode.NEGATIVE) if operation.method == "post" else (mode.POSITIVE,):
            seen += ask(operation.as_strategy(generation_mode=kind), short.url)
    assert seen[200] >= 12 and seen[400] >= 40, f"nothing much was tried: {seen}"
    assert short.engine.llm.engine.healthy and not short.engine.restarts


def ask(cases: Any, url: str) -> Counter[int]:
    """Send what hypothesis draws, the same in every run; how often each status came."""
    seen: Counter[int] = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def one(case: Any) -> None:
        seen[case.call_and_validate(base_url=url, checks=CHECKS).status_code] += 1

    one()
    return seen


def test_what_clients_are_told_adds_up_to_the_counters(running: Running) -> None:
    def figures(http: httpx.Client) -> dict[str, float]:
        families = text_string_to_metric_families(http.get("/metrics").text)
        return {sample.name: sample.value for family in families for sample in family.samples}

    chat = {"messages": [{"role": "user", "content": "What is a block table?"}], "max_tokens": 9}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {**chat, "n": 3}),
        ("/v1/chat/completions", {**chat, "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/completions", {"prompt": ["One two", "Three"], "max_tokens": 7, "n": 2}),
        ("/v1/completions", {"prompt": "One two", "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 5}),
        ("/generate", {"prompt": "A", "max_tokens": 4}),
    ]
    with running.http() as http, ThreadPoolExecutor(8) as clients:
        before = figures(http)
        used = list(clients.map(lambda one: usage(http.post(one[0], json=one[1]).text), asked * 4))
        after = figures(http)
    for counter, names in (
        ("prompt_tokens", ("prompt_tokens", "input_tokens")),
        ("generation_tokens", ("completion_tokens", "output_tokens")),
    ):
        name = f"tiny_llm_{counter}_total"
        assert sum(one.get(n, 0) for one in used for n in names) == after[name] - before[name], counter


def usage(text: str) -> dict[str, int]:
    """What a response, or the last event of a stream before its end, says of tokens."""
    if text.startswith("data:"):
        text = text.strip().split("\n\n")[-2].removeprefix("data: ")
    return dict(json.loads(text)["usage"])


def test_prometheus_reads_our_metrics(http: httpx.Client) -> None:
    text = http.get("/metrics").text
    families = list(text_string_to_metric_families(text))
    assert len(families) > 15
    for family in families:
        assert family.documentation and family.type in KINDS and family.samples, family.name
        assert family.name.startswith("tiny_llm_")


def test_promtool_has_nothing_to_say_of_our_metrics(http: httpx.Client) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not there: apt install prometheus (100 MB) brings it")
    text = http.get("/metrics").text
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
