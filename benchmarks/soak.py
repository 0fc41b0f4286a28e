"""Does the server last? Minutes of mixed traffic on the bundled model: a fifth hangs up, some read slowly.

    python benchmarks/soak.py --minutes 20      or: make soak

``--clients`` clients ask one thing after the other: streams and whole answers, chats, several answers at
once, answers held to a schema, log-probabilities, and requests that are wrong. Every few seconds the server's
memory and file descriptors are looked at. At the end nobody asks, and then no block may be in use, no file
may be open that was not before, and every answer must have been whole: else this exits with 1. Memory is
judged by the part of the run after the first third, when caches are full. Prints a table and one JSON line.
Needs /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from measure.servers import BUNDLED, Server, ours

ABORTED, SLOW, WRONG = 0.2, 0.1, 0.05  # parts of all requests
LOOK_S = 5.0
IDLE_S = 10.0
KV_MEMORY = "64MB"  # full within the first third: what grows afterwards is a leak
MOST_GROWTH = 0.1  # of the memory there was after the first third
PATIENCE_S = 120.0
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}}}
Body = dict[str, object]


@dataclass(slots=True)
class Look:
    """What was seen of the server at a time (seconds from the start)."""

    at: float
    memory_mb: float
    files: int


@dataclass(slots=True)
class Tally:
    """What became of all requests; ``wrong`` has what should not have happened."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def request_of(chance: random.Random) -> tuple[str, Body]:
    """A path and a body, of any kind."""
    words = ("tell", "me", "of", "a", "number", "and", "story", "why")
    prompt = " ".join(chance.choices(words, k=chance.randrange(1, 60)))
    tokens = {"max_tokens": chance.randrange(1, 200), "temperature": chance.choice((0, 0.8))}
    told: Body = {"prompt": prompt, **tokens}
    chat: Body = {"messages": [{"role": "user", "content": prompt}], **tokens}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    return chance.choice(
        (
            ("/v1/completions", {**told, "ignore_eos": True}),
            ("/v1/completions", {**told, "n": 3}),
            ("/v1/completions", {**told, "prompt": [prompt, prompt + " again"]}),
            ("/v1/completions", {**told, "logprobs": 3}),
            ("/v1/completions", {**told, "stop": ["the"], "frequency_penalty": 0.5}),
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", {**chat, "response_format": schema}),
            ("/generate", told),
        )
    )


def wrong_request(chance: random.Random) -> tuple[str, Body]:
    """One that must be refused."""
    bad: Sequence[Body] = ({"prompt": 5}, {"prompt": "a", "n": 10**9}, {"prompt": "a", "nonsense": 1}, {})
    return "/v1/completions", chance.choice(bad)


async def ask(server: Server, chance: random.Random, tally: Tally) -> None:
    """One request of a kind that ``chance`` decides; what comes of it goes into ``tally``."""
    kind = chance.random()
    wrong, slow = kind < WRONG, WRONG <= kind < WRONG + SLOW
    path, body = wrong_request(chance) if wrong else request_of(chance)
    streamed = not wrong and (slow or chance.random() < 0.7)
    body |= {"stream": True} if streamed else {}
    leaves = not wrong and not slow and chance.random() < ABORTED / (1 - WRONG - SLOW)
    name = "wrong" if wrong else "slow" if slow else "left" if leaves else "streamed" if streamed else "whole"
    try:
        said = await asyncio.wait_for(exchange(server, path, body, chance, leaves, slow), PATIENCE_S)
    except (OSError, TimeoutError) as error:
        tally.wrong.append(f"{name}: {type(error).__name__}: {error}")
        return
    tally.counts[name] += 1
    if not leaves and (why := fault(said, 400 if wrong else 200, streamed)):
        tally.wrong.append(f"{name} {path}: {why}")


async def exchange(
    server: Server, path: str, body: Body, chance: random.Random, leaves: bool, slow: bool
) -> bytes:
    """Send a request and return all that is said, or what there was when this client left."""
    one = socket.socket()
    one.setblocking(False)
    if slow:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await asyncio.get_running_loop().sock_connect(one, server.target.place)
    reader, writer = await asyncio.open_connection(sock=one, limit=4096)
    try:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += "Connection: close\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        said = b""
        end = time.monotonic() + chance.random() * 0.5
        while not leaves or time.monotonic() < end:
            left = max(0.0, end - time.monotonic()) if leaves else None
            try:
                piece = await asyncio.wait_for(reader.read(1024 if slow else 65536), left)
            except TimeoutError:
                break
            if not piece:
                break
            said += piece
            if slow:
                await asyncio.sleep(0.05)
        return said
    finally:
        writer.transport.abort()


def fault(said: bytes, status: int, streamed: bool) -> str:
    """What is wrong with a response; nothing if it is whole."""
    first = said.split(b"\r\n", 1)[0].decode()
    if f" {status} " not in first:
        return f"expected {status}: {first or 'no answer'} {said[-200:]!r}"
    if streamed and (b"data: [DONE]" not in said or b'"error"' in said):
        return f"the stream broke off: {said[-200:]!r}"
    return ""


def look(server: Server, began: float) -> Look:
    """The server as the system sees it."""
    proc = Path(f"/proc/{server.pid}")
    resident = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("VmRSS"))
    return Look(time.monotonic() - began, int(resident.split()[1]) / 1024, len(list((proc / "fd").iterdir())))


async def soak(server: Server, clients: int, seconds: float) -> tuple[list[Look], Tally]:
    """Traffic for so long, and what was seen meanwhile."""
    began, tally, looks = time.monotonic(), Tally(), []
    end = began + seconds

    async def client(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            await ask(server, chance, tally)

    async def watch() -> None:
        while time.monotonic() < end:
            looks.append(look(server, began))
            await asyncio.sleep(LOOK_S)

    await asyncio.gather(watch(), *(client(number) for number in range(clients)))
    return looks, tally


def metrics(server: Server) -> dict[str, float]:
    """The server's own figures, by name, without labels."""
    with urllib.request.urlopen(server.target.url + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().split("\n")
    return {
        line.split("{")[0].removeprefix("tiny_llm_"): float(line.rsplit(" ", 1)[1])
        for line in lines
        if "{" in line and not line.startswith("#")
    }


def idle(server: Server) -> dict[str, float]:
    """What is in use once nobody asks; it is given a while to settle."""
    end = time.monotonic() + IDLE_S
    while True:
        told = metrics(server)
        rest = {
            name: told[name]
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_used_blocks")
        }
        if not any(rest.values()) or time.monotonic() > end:
            return rest
        time.sleep(0.2)


def slope_mb_h(looks: Sequence[Look]) -> float:
    """How memory grows after the first third, in MB an hour: a least-squares line."""
    later = looks[len(looks) // 3 :]
    if len(later) < 2:
        return 0.0
    return (
        3600 * statistics.linear_regression([one.at for one in later], [one.memory_mb for one in later]).slope
    )


def main() -> None:
    """Soak, print, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with closing(ours(BUNDLED, options.threads, "--kv-memory", KV_MEMORY)) as server:
        asyncio.run(soak(server, 4, 2.0))  # what is loaded late is loaded now
        before = look(server, time.monotonic())
        looks, tally = asyncio.run(soak(server, options.clients, 60 * options.minutes))
        rest = idle(server)
        after = look(server, time.monotonic())
    third = looks[len(looks) // 3].memory_mb
    problems = tally.wrong[:5]
    problems += [f"{name} is {value:g} when nobody asks" for name, value in rest.items() if value]
    if after.files > before.files:
        problems.append(f"{after.files} files are open, {before.files} were")
    if after.memory_mb > third * (1 + MOST_GROWTH):
        problems.append(f"memory grew from {third:.0f} to {after.memory_mb:.0f} MB after the first third")
    told = {
        "requests": dict(tally.counts),
        "wrong": len(tally.wrong),
        "memory_mb": [round(one, 1) for one in (before.memory_mb, third, after.memory_mb)],
        "slope_mb_h": round(slope_mb_h(looks), 1),
        "files": [before.files, max(one.files for one in looks), after.files],
        "idle": rest,
        "problems": problems,
    }
    for name, value in told.items():
        print(f"{name:<12}{value}")
    print(json.dumps({"benchmark": "soak", "minutes": options.minutes, "clients": options.clients, **told}))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
