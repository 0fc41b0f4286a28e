"""Prompts computed by another process: the same tokens, and an answer whatever becomes of the other one."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tiny_llm import LLM, ConfigError, SamplingParams
from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.server.decode_side import DecodeSide
from tiny_llm.server.peer import Peer
from tiny_llm.server.prefill_side import PrefillSide

pytestmark = pytest.mark.slow

SECRET, PATIENCE_S, SIZE = "between us", 30.0, 16
LONG = [5 + (7 * number) % 500 for number in range(600)]
BLOCKS = -(-(len(LONG) - 1) // SIZE)
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, speculate=False)
SLOW_PREFILL = """
import sys, time
from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.server.peer import Peer
from tiny_llm.server.prefill_side import PrefillSide

llm = AsyncLLM(sys.argv[1], scheduler=SchedulerSettings(max_num_batched_tokens=64, max_num_seqs=8))
model = llm.llm.engine.runner.model

def slow(*args):
    time.sleep(0.1)
    return model(*args)

slow.config = model.config
llm.llm.engine.runner.model = slow
print(PrefillSide(llm, Peer("127.0.0.1:" + sys.argv[2], "between us")).port, flush=True)
time.sleep(600)
"""


class SlowPrefill:
    """Role "prefill" in a process of its own, 64 tokens each tenth of a second."""

    def __init__(self, demo: Path, port: int = 0) -> None:
        command = [sys.executable, "-c", SLOW_PREFILL, str(demo), str(port)]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._child.stdout is not None
        self.port = int(self._child.stdout.readline())

    def tell(self, number: signal.Signals) -> None:
        os.kill(self._child.pid, number)

    def end(self) -> None:
        self._child.kill()
        self._child.wait()


class Relay:
    """Stands between the two, and flips a bit of what comes from the prefill side once it is told to."""

    def __init__(self, port: int) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._target = port
        self.port = self._listening.getsockname()[1]
        self.damages = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            self._open += [near, far]
            for source, sink, back in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._pass_on, args=(source, sink, back), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        try:
            while data := bytearray(source.recv(2**16)):
                if back and self.damages and len(data) > 1000:
                    self.damages -= 1
                    data[500] ^= 4
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        for one in (self._listening, *self._open):
            one.close()


@contextmanager
def both(
    demo: Path, options: dict[str, Any] | None = None, engine: EngineSettings | None = None
) -> Iterator[tuple[AsyncLLM, DecodeSide]]:
    """Two engines of this process, of which the second has its prompts computed by the first."""
    options = options or {}
    with ExitStack() as stack:
        near, far = (AsyncLLM(demo, **options, **more) for more in ({"engine": engine}, {}))
        stack.callback(near.close)
        stack.callback(far.close)
        prefill = PrefillSide(far, Peer("127.0.0.1:0", SECRET, 60))
        stack.callback(prefill.close)
        yield near, stack.enter_context(decoding(near, prefill.port))


@contextmanager
def decoding(llm: AsyncLLM, port: int, timeout_s: int = 60, secret: str = SECRET) -> Iterator[DecodeSide]:
    side = DecodeSide(llm, Peer(f"127.0.0.1:{port}", secret, timeout_s))
    try:
        if secret == SECRET:
            wait_for(lambda: side.is_connected, "a connection")
        yield side
    finally:
        side.close()


def wait_for(done: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < end, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.005)


def tokens(llm: AsyncLLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
    """The answers to prompts that come at once."""

    async def ask() -> list[list[int]]:
        pairs = zip(prompts, params, strict=True)
        answers = await asyncio.gather(*(llm.generate(*pair) for pair in pairs))
        return [completion.token_ids for answer in answers for completion in answer]

    return asyncio.run(ask())


def traffic(seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Long prompts and short ones, of which some begin alike; greedy and drawn."""
    chance = random.Random(seed)
    shared = [[chance.randrange(5, 500) for _ in range(200)] for _ in range(2)]
    prompts = [
        chance.choice([[], *shared])
        + [chance.randrange(5, 500) for _ in range(chance.choice((5, 40, 150, 400)))]
        for _ in range(10)
    ]
    kinds = (
        GREEDY,
        SamplingParams(max_tokens=20, seed=3, ignore_eos=True),
        SamplingParams(n=2, seed=1, max_tokens=6),
    )
    return prompts, [chance.choice(kinds) for _ in prompts]


@pytest.mark.parametrize(
    ("options", "blocks"), [({}, 512), ({"kv_dtype": "int8"}, 512), ({"draft": "demo-draft"}, 60)]
)
def test_tokens_are_those_of_one_process_alone(demo: Path, options: dict[str, Any], blocks: int) -> None:
    """In traffic, whatever keys and values are kept in; with a draft model, and a pool too small for all."""
    prompts, params = traffic(blocks)
    with LLM(demo, **options) as alone:
        pairs = zip(prompts, params, strict=True)
        expected = [one.token_ids for prompt, own in pairs for one in alone.generate([prompt], own)]
    with both(demo, options, EngineSettings(kv_blocks=blocks)) as (llm, side):
        assert tokens(llm, prompts, params) == expected
        assert side.counts["asked"] >= 3 and side.counts["blocks"], side.counts
        assert side.counts["bytes"] == side.counts["blocks"] * llm.llm.engine.cache.format.block_bytes
        llm.llm.engine.scheduler.check_integrity()


def test_what_is_there_is_not_sent(demo: Path) -> None:
    with both(demo) as (llm, side):
        tokens(llm, [LONG[:320]], [GREEDY])
        assert side.counts == side.counts | {"asked": 1, "blocks": 20, "in_vain": 0}
        tokens(llm, [LONG] * 4, [GREEDY] * 4)
        assert side.counts["asked"] == 2, "three wait for what the first has asked for"
        assert side.counts["blocks"] == BLOCKS, "its beginning was here"
        tokens(llm, [LONG, [*LONG, 7], LONG[:40]], [GREEDY] * 3)
        assert side.counts["asked"] == 2, "nothing was missing, or too little"
        scored = SamplingParams(max_tokens=1, prompt_logprobs=1)
        tokens(llm, [LONG[::-1]], [scored])
        assert side.counts["asked"] == 2, "all its rows are wanted"


def test_requests_of_different_salts_share_nothing_over_there_either(demo: Path) -> None:
    with both(demo) as (llm, side):
        for salt in ("one", "other"):
            (answer,) = asyncio.run(llm.generate(LONG, GREEDY, salt=salt))
            assert answer.cached_tokens == len(LONG) - 1, "all but the last: nothing is left but a decode"
        assert side.counts["blocks"] == 2 * BLOCKS


async def in_mid_prompt(llm: AsyncLLM, side: DecodeSide, act: Callable[[], None]) -> list[int]:
    """The answer to LONG, of which some blocks had come when ``act`` was called."""
    asking: Awaitable[Any] = asyncio.ensure_future(llm.generate(LONG, GREEDY))
    while not side.counts["blocks"]:
        await asyncio.sleep(0.005)
    act()
    (answer,) = await asyncio.wait_for(asking, PATIENCE_S)
    assert 0 < answer.cached_tokens < len(LONG) - SIZE, "a part was computed there, the rest here"
    found: list[int] = answer.token_ids
    return found


def test_who_dies_or_stops_in_mid_prompt_costs_no_answer(demo: Path) -> None:
    """kill -9 and SIGSTOP; a new one on the same port is used again."""
    with LLM(demo) as alone:
        expected = [alone.generate([prompt], GREEDY)[0].token_ids for prompt in (LONG, LONG[::-1])]
    with ExitStack() as stack:
        llm = AsyncLLM(demo)
        stack.callback(llm.close)
        other = SlowPrefill(demo)
        stack.callback(other.end)
        side = stack.enter_context(decoding(llm, other.port, 1))
        assert asyncio.run(in_mid_prompt(llm, side, lambda: other.tell(signal.SIGSTOP))) == expected[0]
        wait_for(lambda: not side.is_connected, "its silence to be noticed")
        assert tokens(llm, [LONG[::-1]], [GREEDY]) == [expected[1]], "it is not waited for again"
        assert side.counts["asked"] == 1
        other.tell(signal.SIGCONT)
        wait_for(lambda: side.is_connected, "it to be found again")
        llm.llm.engine.scheduler.blocks.clear()  # nothing is here, as at the beginning
        side.counts["blocks"] = 0
        assert asyncio.run(in_mid_prompt(llm, side, lambda: other.tell(signal.SIGKILL))) == expected[0]
        assert side.counts["in_vain"] == 2
        again = SlowPrefill(demo, other.port)
        stack.callback(again.end)
        wait_for(lambda: side.is_connected, "the new one")


def test_who_is_slow_is_not_waited_for(demo: Path) -> None:
    """It says that it lives, but computes nothing for longer than a prompt waits."""
    with both(demo) as (llm, side), ExitStack() as stack:
        side.close()
        prefill = PrefillSide(AsyncLLM(demo), Peer("127.0.0.1:0", SECRET))
        stack.callback(prefill.close)
        go_on = threading.Event()
        prefill._llm.post(lambda: go_on.wait(PATIENCE_S) and None)
        stack.callback(go_on.set)
        slow = stack.enter_context(decoding(llm, prefill.port, 1))
        assert len(tokens(llm, [LONG], [GREEDY])[0]) == 8
        assert slow.counts == {"asked": 1, "blocks": 0, "bytes": 0, "in_vain": 1} and slow.is_connected


def test_a_damaged_frame_is_not_taken(demo: Path) -> None:
    with LLM(demo) as alone:
        expected = alone.generate([LONG], GREEDY)[0].token_ids
    with both(demo) as (llm, side), ExitStack() as stack:
        side.close()
        relay = Relay(side._peer.place[1])
        stack.callback(relay.close)
        damaged = stack.enter_context(decoding(llm, relay.port))
        relay.damages = 1
        assert tokens(llm, [LONG], [GREEDY]) == [expected]
        assert damaged.counts["blocks"] == 0 and damaged.counts["in_vain"] == 1
        wait_for(lambda: damaged.is_connected, "another connection")
        tokens(llm, [LONG[::-1]], [GREEDY])
        assert damaged.counts["in_vain"] == 1 and damaged.counts["blocks"] == BLOCKS


@pytest.mark.parametrize("secret", [SECRET, "another"])
def test_strangers_get_no_blocks(demo: Path, secret: str, caplog: pytest.LogCaptureFixture) -> None:
    """Another secret; and with the right one, keys and values of another kind."""
    with both(demo) as (_, side), ExitStack() as stack:
        other = AsyncLLM(demo, kv_dtype="int8" if secret == SECRET else "auto")
        stack.callback(other.close)
        stranger = DecodeSide(other, Peer(side._peer.address, secret))
        stack.callback(stranger.close)
        told = "are not ours" if secret == SECRET else "another secret"
        wait_for(
            lambda: f"does not: It has {told}" in caplog.text or f"values {told}" in caplog.text, "a reason"
        )
        assert len(tokens(other, [LONG], [GREEDY])[0]) == 8 and not stranger.counts["asked"]


def test_what_cannot_work_is_refused() -> None:
    for given, told in (
        (("here", SECRET), "HOST:PORT"),
        (("here:99999", SECRET), "HOST:PORT"),
        (("here:1", ""), "TINY_LLM_PEER_SECRET"),
        (("here:1", SECRET, 0), "--peer-timeout"),
    ):
        with pytest.raises(ConfigError, match=told):
            Peer(*given)  # type: ignore[arg-type]
    assert Peer("[::1]:80", SECRET).place == ("::1", 80)


def test_two_servers(start_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user starts them; the second goes on when the first is gone."""
    monkeypatch.setenv("TINY_LLM_PEER_SECRET", SECRET)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    servers = []
    try:
        for role in ("prefill", "decode"):
            servers.append(start_process("--role", role, "--peer", f"127.0.0.1:{port}"))
        asked = {"prompt": LONG, "max_tokens": 8, "temperature": 0}
        with servers[0].http() as first, servers[1].http() as second:
            said = [one.post("/v1/completions", json=asked).json() for one in (second, first)]
            assert said[0]["choices"][0]["text"] == said[1]["choices"][0]["text"]
            cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in said]
            assert cached == [599, 0], "a prompt that comes for another process is nobody else's"
            servers[0].end()
            answer = second.post("/v1/completions", json=asked | {"prompt": LONG[::-1]})
            assert answer.status_code == 200
    finally:
        for server in servers:
            server.end()
