"""Several servers behind smg, a gateway that others keep: what clients see when one dies, drains, returns."""

from __future__ import annotations

import json
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest
from measure.environments import PeerMissing
from measure.servers import smg, workers

if TYPE_CHECKING:
    from tests.server.conftest import Process

pytestmark = pytest.mark.slow

WATCHFUL = ("--health-check-interval-secs", "1", "--health-failure-threshold", "1")
WATCHFUL += ("--health-success-threshold", "1")
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
MODEL: dict[str, Any] = {"model": "demo"}  # smg wants it


@contextmanager
def replicas(start_process: Any, number: int, *options: str) -> Iterator[list[Process]]:
    """Servers on the bundled model, started side by side; ended with the block, whatever they do."""
    with ExitStack() as stack, ThreadPoolExecutor(number) as starting:
        begun = [starting.submit(start_process, "--threads", "1", *options) for _ in range(number)]
        servers = [one.result() for one in begun]
        for one in servers:
            stack.callback(one.end)
        yield servers


@contextmanager
def gateway(servers: list[Process], *options: str) -> Iterator[str]:
    """Where smg listens, which sends on by what servers have cached."""
    try:
        started = smg([one.url for one in servers], "cache_aware", *options)
    except PeerMissing as missing:
        pytest.skip(str(missing))
    with closing(started):
        yield started.target.url


def client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60, verify=False)


def load(server: Process) -> int:
    """Sequences that a server has at the moment, in its own words."""
    with server.http() as http:
        return int(http.get("/v1/loads").json()["loads"][0]["num_total_reqs"])


def prompt_tokens(server: Process) -> float:
    """Of all requests that a server began."""
    with server.http() as http:
        lines = http.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("tiny_llm_prompt_tokens_total"))


def test_requests_that_begin_alike_come_to_where_that_is_cached(start_process: Any, until: Any) -> None:
    """A server's pool holds three of the four texts that the 40 requests begin with, and not all."""
    chance = random.Random(0)
    texts = [" ".join(chance.choices(("the", "a", "of", "to", "in", "is", "it"), k=560)) for _ in range(4)]

    def ask(text: str) -> tuple[int, int]:
        body = {**MODEL, "prompt": f"{text} {chance.randrange(100)}", "max_tokens": 4}
        with client(url) as http:
            usage = http.post(TEXT, json=body).json()["usage"]
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]

    with (
        replicas(start_process, 2, "--kv-memory", "6MB") as servers,
        gateway(servers, "--worker-wedge-secs", "120") as url,  # held still, they look so
        ThreadPoolExecutor(4) as clients,
    ):
        # The first four are under way at once: of idle servers smg takes any, maybe one for all.
        for server in servers:
            server.tell(signal.SIGSTOP)
        first: list[Future[tuple[int, int]]] = []
        for text in texts:
            first.append(clients.submit(ask, text))
            until(lambda: sum(one["load"] for one in workers(url)) == len(first), "smg to have taken it")
        assert all(one["load"] for one in workers(url)), "one server has them all"
        for server in servers:
            server.tell(signal.SIGCONT)
        told = [one.result() for one in first] + [ask(chance.choice(texts)) for _ in range(36)]
    cached, tokens = sum(one[1] for one in told), sum(one[0] for one in told)
    assert cached >= 0.85 * tokens, f"{cached} of {tokens}: {told}"


def test_a_killed_server_ends_its_streams_in_order_and_is_taken_back(start_process: Any, until: Any) -> None:
    begun = threading.Semaphore(0)

    def stream(number: int) -> list[str]:
        """The events of an answer that takes long."""
        body = {**MODEL, "max_tokens": 900, "ignore_eos": True, "stream": True}
        text = f"{number} a story"
        body |= {"prompt": text} if number % 2 else {"messages": [{"role": "user", "content": text}]}
        with client(url) as http, http.stream("POST", TEXT if number % 2 else CHAT, json=body) as answer:
            lines = answer.iter_lines()
            events = [next(lines)]
            begun.release()
            return events + [line for line in lines if line.startswith("data: ")]

    def ask(number: int) -> int:
        with client(url) as http:
            asked = {**MODEL, "prompt": f"{number} times", "max_tokens": 2}
            return http.post(TEXT, json=asked).status_code

    with (
        replicas(start_process, 2) as servers,
        gateway(servers, *WATCHFUL) as url,
        ThreadPoolExecutor(4) as clients,
    ):
        streams = [clients.submit(stream, number) for number in range(4)]
        for _ in streams:
            assert begun.acquire(timeout=60)
        victim = max(servers, key=load)
        other = next(one for one in servers if one is not victim)
        hit = load(victim)
        victim.tell(signal.SIGKILL)
        ended = [one.result() for one in streams]
        cut = [events for events in ended if "stream_error" in events[-2]]
        assert 1 <= len(cut) <= hit, "some of what ran there was not done"
        for events in ended:
            assert events[-1] == "data: [DONE]"
            assert ("error" in json.loads(events[-2].removeprefix("data: "))) == (events in cut)
        assert [ask(number) for number in range(20)] == [200] * 20
        assert victim.wait() == -signal.SIGKILL

        servers.append(back := start_process("--threads", "1", "--port", victim.url.rsplit(":", 1)[1]))
        try:
            until(lambda: all(one["is_healthy"] for one in workers(url)), "smg to see that it is up again")
            other.tell(signal.SIGKILL)
            before = prompt_tokens(back)
            assert [ask(number) for number in range(20, 25)] == [200] * 5
            assert prompt_tokens(back) > before
        finally:
            back.end()


def test_no_request_fails_while_one_of_three_drains(start_process: Any, until: Any) -> None:
    done: list[bool] = []
    enough = threading.Event()

    def keep_asking(number: int) -> list[str]:
        """Ask, streamed or not, until it is enough; what went wrong."""
        chance, wrong = random.Random(number), []
        with client(url) as http:
            while not enough.is_set():
                body = {**MODEL, "prompt": f"{chance.random()} reasons", "ignore_eos": True}
                body |= {"max_tokens": chance.randrange(1, 90), "stream": chance.random() < 0.5}
                answer = http.post(TEXT, json=body)
                whole = '"finish_reason":"length"' in answer.text
                if answer.status_code != 200 or not whole or '"error"' in answer.text:
                    wrong.append(f"{answer.status_code} {answer.text[-300:]}")
                done.append(whole)
        return wrong

    with (
        replicas(start_process, 3) as servers,
        gateway(servers, *WATCHFUL) as url,
        ThreadPoolExecutor(6) as clients,
    ):
        asking = [clients.submit(keep_asking, number) for number in range(6)]
        try:
            until(lambda: len(done) >= 12, "some to be answered")
            busy = max(servers, key=load)
            busy.tell(signal.SIGTERM)
            assert busy.wait() == 0
            before = len(done)
            until(lambda: len(done) >= before + 20, "more to be answered by the others")
        finally:
            enough.set()
        assert [one.result() for one in asking] == [[]] * 6
