"""Several models in one server: each by its name, loaded when asked for, unloaded when nobody uses it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest

from tiny_llm import LLM, AsyncLLM, SamplingParams, cli
from tiny_llm.engine.budget import MemoryBudget, Share
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.errors import WeightError
from tiny_llm.server import models
from tiny_llm.server.run import Server, listen
from tiny_llm.server.service import Service
from tiny_llm.server.settings import ServerSettings

if TYPE_CHECKING:
    from tests.server.conftest import Process

CHAT = "/v1/chat/completions"
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 4, "temperature": 0}
Until = Callable[[Callable[[], bool], str], None]


def loader(folder: Path) -> Callable[[], AsyncLLM]:
    return lambda: AsyncLLM(folder, engine=EngineSettings(kv_blocks=64))


@contextlib.contextmanager
def serving(
    until: Until, *services: Service, unload_after_s: float | None = None, budget: MemoryBudget | None = None
) -> Iterator[httpx.Client]:
    """The first one is loaded."""
    listening = listen("127.0.0.1", 0)
    server = Server(services[0], listening, services[1:], unload_after_s, budget)

    async def run() -> None:
        serving = asyncio.ensure_future(server.serve([listening]))
        await services[0].start()
        await serving
        await server.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    try:
        until(lambda: server.started and services[0].state == "ready", "the server")
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60, verify=False) as http:
            yield http
    finally:
        server.leave()
        thread.join(20)
        listening.close()
        assert not thread.is_alive()


@pytest.fixture
def two(demo: Path) -> tuple[Service, Service]:
    large = Service(ServerSettings(name="large", aliases=("gpt-*",)), loader(demo), 1)
    return large, Service(ServerSettings(name="small", aliases=("claude-*",)), loader(demo / "draft"), 1)


def test_each_answers_by_its_name_and_is_loaded_when_asked_for(
    two: tuple[Service, Service], until: Until
) -> None:
    with serving(until, *two) as http:
        assert two[1].state == "unloaded"
        cards = {card["id"]: card["max_model_len"] for card in http.get("/v1/models").json()["data"]}
        assert cards == {"large": two[0].llm.max_context, "small": None}
        assert http.get("/v1/models/small").json()["id"] == "small" and two[1].state == "unloaded"
        told = {
            name: http.post(CHAT, json={**ASKED, "model": name}) for name in ("large", "small", "claude-x")
        }
        assert [answer.json()["model"] for answer in told.values()] == ["large", "small", "small"]
        assert two[1].state == "ready" and two[1].llm.config != two[0].llm.config
        assert http.post(CHAT, json=ASKED).json()["model"] == "large"
        texts = [answer.json()["choices"][0]["message"] for answer in told.values()]
        assert texts[1] == texts[2]
        for name in ("large", "small"):
            told_of = http.get("/metrics", params={"model": name}).text
            assert f'model_name="{name}"' in told_of


def test_a_third_is_refused_with_the_names_of_those_that_there_are(
    two: tuple[Service, Service], until: Until
) -> None:
    with serving(until, *two) as http:
        for path in (CHAT, "/v1/messages"):
            answer = http.post(path, json={**ASKED, "model": "smal"})
            assert answer.status_code == 404 and "Did you mean 'small'?" in answer.json()["error"]["message"]
        assert http.get("/v1/models/other").status_code == 404
        assert http.post(CHAT, content=b"{", headers={"Content-Type": "application/json"}).status_code == 400


def test_many_who_ask_at_once_have_it_loaded_once(demo: Path, until: Until) -> None:
    loaded = []

    def load() -> AsyncLLM:
        loaded.append(1)
        return loader(demo / "draft")()

    services = Service(ServerSettings(name="a"), loader(demo)), Service(ServerSettings(name="b"), load)
    with serving(until, *services) as http:

        async def all_at_once() -> list[int]:
            async with httpx.AsyncClient(base_url=http.base_url, timeout=60, verify=False) as client:
                posts = [client.post(CHAT, json={**ASKED, "model": "b"}) for _ in range(8)]
                return [answer.status_code for answer in await asyncio.gather(*posts)]

        assert asyncio.run(all_at_once()) == [200] * 8
    assert loaded == [1]


def test_what_nobody_uses_is_unloaded_and_comes_back(two: tuple[Service, Service], until: Until) -> None:
    with serving(until, *two, unload_after_s=0.05) as http:
        first = http.post(CHAT, json={**ASKED, "model": "small"}).json()["choices"]
        until(lambda: two[1].state == "unloaded", "small to be unloaded")
        assert http.get("/health").status_code == 200
        assert http.post(CHAT, json={**ASKED, "model": "small"}).json()["choices"] == first


def test_a_stream_keeps_its_model(two: tuple[Service, Service], until: Until) -> None:
    asked = {**ASKED, "model": "small", "stream": True, "max_tokens": 40, "ignore_eos": True}
    with serving(until, *two, unload_after_s=0.0) as http, http.stream("POST", CHAT, json=asked) as stream:
        lines = [line for line in stream.iter_lines() if line.startswith("data: {")]
        assert len(lines) > 30


def test_room_is_made_by_what_nobody_uses(
    two: tuple[Service, Service], until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is there for one of them."""
    monkeypatch.setattr(models, "available_memory_bytes", lambda: int(all(s.state != "ready" for s in two)))
    with serving(until, *two) as http:
        for name in ("small", "large", "small"):
            assert http.post(CHAT, json={**ASKED, "model": name}).status_code == 200
            assert [service.settings.name for service in two if service.state == "ready"] == [name]
        monkeypatch.setattr(models, "available_memory_bytes", lambda: 0)
        answer = http.post(CHAT, json={**ASKED, "model": "large"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_memory"


@pytest.mark.slow
def test_a_busy_model_uses_what_the_other_leaves_and_that_one_starts_when_asked(
    demo: Path, until: Until
) -> None:
    """Both answer as one alone does; unloading gives all back."""
    prompts = [f"Tell me about the number {number}, please." for number in range(30)]
    asked = {"max_tokens": 40, "temperature": 1.0, "seed": 7, "ignore_eos": True}
    with LLM(demo) as llm:
        params = SamplingParams(max_tokens=40, temperature=1.0, seed=7, ignore_eos=True)
        expected = [answer.text for answer in llm.generate(prompts, params)]
        budget = MemoryBudget(30 * llm.engine.block_bytes, 2)

    def load(share: Share) -> AsyncLLM:
        loaded = AsyncLLM(demo, kv_memory=share)
        loaded.after_step = look
        return loaded

    most = [0]

    def look() -> None:
        with budget.changed:
            held = [share.held for share in budget.shares]
        most[0] = max(most[0], held[0])
        assert sum(held) <= budget.total

    loads = [functools.partial(load, budget.share()) for _ in range(2)]
    services = [
        Service(ServerSettings(name=n), one, 1) for n, one in zip(("busy", "light"), loads, strict=True)
    ]
    with serving(until, *services, unload_after_s=1.0, budget=budget) as http:
        assert http.post(CHAT, json={**ASKED, "model": "light"}).status_code == 200

        async def all_at_once() -> tuple[list[str], str, int]:
            limits = httpx.Limits(max_connections=40)
            url = http.base_url
            async with httpx.AsyncClient(base_url=url, timeout=60, verify=False, limits=limits) as client:

                async def post(model: str, prompt: str) -> str:
                    body = {**asked, "model": model, "prompt": prompt}
                    answer = (await client.post("/v1/completions", json=body)).json()
                    return str(answer["choices"][0]["text"])

                posts = [asyncio.ensure_future(post("busy", prompt)) for prompt in prompts]
                while most[0] < budget.total and not all(one.done() for one in posts):
                    await asyncio.sleep(0.001)
                first = await post("light", prompts[0])
                left = sum(not one.done() for one in posts)
                return await asyncio.gather(*posts), first, left

        texts, first, left = asyncio.run(all_at_once())
        assert texts == expected and first == expected[0]
        assert most[0] == budget.total and left, "the light one's answer was there before the busy one's were"
        until(lambda: services[1].state == "unloaded", "light to be unloaded")
        until(lambda: services[0].state == "unloaded", "busy to be unloaded")
        until(lambda: not any(share.held for share in budget.shares), "all to be given back")


def test_a_model_on_its_way_has_its_memory_promised(
    demo: Path, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is read yet, so the machine still says that all is free."""
    free = [100]
    monkeypatch.setattr(models, "available_memory_bytes", lambda: free[0])
    under_way, go_on = threading.Semaphore(0), threading.Event()

    def load() -> AsyncLLM:
        under_way.release()
        assert go_on.wait(20)
        return loader(demo / "draft")()

    budget = MemoryBudget(0, 3)
    services = (
        Service(ServerSettings(name="a"), loader(demo / "draft")),
        *(Service(ServerSettings(name=name), load, 60) for name in ("b", "c")),
    )
    with serving(until, *services, budget=budget) as http, ThreadPoolExecutor() as threads:

        def post(name: str) -> httpx.Response:
            return http.post(CHAT, json={**ASKED, "model": name})

        with http.stream("POST", CHAT, json={**ASKED, "stream": True, "max_tokens": 200}):  # a is in use
            first = threads.submit(post, "b")
            assert under_way.acquire(timeout=20) and budget.loading == 60
            refused = post("c")
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "no_memory"
            free[0] = 120
            second = threads.submit(post, "c")
            assert under_way.acquire(timeout=20) and budget.loading == 120, "both are under way"
        go_on.set()
        assert [first.result().status_code, second.result().status_code] == [200, 200]
        assert budget.loading == 0


def test_one_that_cannot_be_loaded_harms_no_other(demo: Path, until: Until) -> None:
    def fail() -> AsyncLLM:
        raise WeightError("model.safetensors is not whole.")

    services = Service(ServerSettings(name="a"), loader(demo)), Service(ServerSettings(name="b"), fail)
    with serving(until, *services) as http:
        answer = http.post(CHAT, json={**ASKED, "model": "b"})
        assert answer.status_code == 503 and "is not whole" in answer.json()["error"]["message"]
        assert http.post(CHAT, json=ASKED).status_code == 200


@pytest.mark.slow
def test_the_command_takes_several(start_process: type[Process]) -> None:
    options = ("--model", "demo", "--model", "demo-draft", "--alias", "claude-*=demo-draft")
    served = start_process(*options, "--kv-memory", "80MB")
    try:
        assert "keys and values up to 0.08 GB" in served.memory
        assert "demo, demo-draft" in served.said
        with served.http() as http:
            answer = http.post("/v1/messages", json={**ASKED, "model": "claude-of-tomorrow"})
            assert answer.json()["model"] == "demo-draft"
    finally:
        served.end()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model", "demo", "--model", "demo"], "two of them have one name"),
        (["--model", "demo", "--model", "demo-draft", "--name", "x"], "--name is of one model"),
        (["--alias", "x=demi"], "Did you mean 'demo'?"),
    ],
)
def test_names_that_do_not_tell_are_refused(
    options: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py", "serve", *options])
    assert cli.main() == 2
    assert told in capsys.readouterr().err
