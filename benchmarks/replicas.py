"""Several servers for one: prompts found in their caches behind a gateway, and answers a second.

    python benchmarks/replicas.py

First 40 requests one after the other, whose prompts begin with four long texts in random order, where a
server's pool holds three of those: at one server, and at two behind smg, by a policy that does not look at
prompts and by one that does. Then short prompts, ``--streams`` at a time, at one server of one thread and at
two such, in turns, both behind smg. This client runs on the same cores. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

from measure.environments import PeerMissing
from measure.machine import foreign_share_now, warning
from measure.servers import BUNDLED, ours, smg

WORDS = ("the", "a", "of", "to", "in", "is", "it")
POOL = "6MB"  # of the bundled model's keys and values: some 1,950 tokens
REQUESTS, TEXTS, LENGTH = 40, 4, 560


def ask(url: str, prompt: str, tokens: int) -> dict[str, object]:
    """An answer of exactly so many tokens; its usage."""
    body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as answer:
        usage: dict[str, object] = json.load(answer)["usage"]
    return usage


@contextmanager
def place(number: int, policy: str | None, *options: str) -> Iterator[str]:
    """Where so many servers are asked: the one, or smg before them."""
    with ExitStack() as stack:
        servers = [stack.enter_context(closing(ours(BUNDLED, 1, *options))) for _ in range(number)]
        urls = [one.target.url for one in servers]
        yield stack.enter_context(closing(smg(urls, policy))).target.url if policy else urls[0]


def cached_share(url: str, seed: int) -> float:
    """Of the prompts' tokens, those that were found in a cache."""
    chance = random.Random(seed)
    texts = [" ".join(chance.choices(WORDS, k=LENGTH)) for _ in range(TEXTS)]
    told = [ask(url, f"{chance.choice(texts)} {chance.randrange(100)}", 4) for _ in range(REQUESTS)]
    cached = sum(one["prompt_tokens_details"]["cached_tokens"] for one in told)  # type: ignore[index]
    return cached / sum(one["prompt_tokens"] for one in told)  # type: ignore[misc]


def tokens_a_second(url: str, streams: int, answers: int, seed: int) -> float:
    """Of short prompts that have nothing in common."""
    prompts = [f"{random.Random(seed * answers + n).random()} is a number" for n in range(answers)]
    began = time.perf_counter()
    with ThreadPoolExecutor(streams) as clients:
        list(clients.map(lambda prompt: ask(url, prompt, 64), prompts))
    return 64 * answers / (time.perf_counter() - began)


def prefixes(rounds: int) -> dict[str, list[float]]:
    """The share by side, of each round."""
    sides = {"one server": (1, None), "two, random": (2, "random"), "two, cache_aware": (2, "cache_aware")}
    shares: dict[str, list[float]] = {name: [] for name in sides}
    for seed in range(rounds):
        for name, (number, policy) in sides.items():
            with place(number, policy, "--kv-memory", POOL) as url:
                shares[name].append(cached_share(url, seed))
    return shares


def throughput(rounds: int, streams: int) -> dict[str, list[float]]:
    """Tokens a second by side, of each round, the sides in turns."""
    with place(1, "round_robin") as one, place(2, "round_robin") as two:
        sides = {"one server": one, "two servers": two}
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for seed in range(-1, rounds):
            for name, url in sides.items():
                speed = tokens_a_second(url, streams, 4 * streams, seed)
                if seed >= 0:  # the first is to warm up
                    speeds[name].append(speed)
    return speeds


def table(title: str, rows: dict[str, list[float]], form: str) -> None:
    """Median, least and most of each side."""
    print(f"\n{title:34} median    least     most")
    for name, values in rows.items():
        shown = (statistics.median(values), min(values), max(values))
        print(f"{name:30}" + "".join(f"{value:>10{form}}" for value in shown))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    options = parser.parse_args(arguments)
    if busy := warning(foreign_share_now(), "before the first round"):
        print(busy, file=sys.stderr)
    try:
        shares, speeds = prefixes(options.rounds), throughput(options.rounds, options.streams)
    except PeerMissing as missing:
        print(missing, file=sys.stderr)
        return
    table("prompts' tokens cached", shares, ".1%")
    table(f"tok/s, {options.streams} at a time", speeds, ",.0f")
    one, two = speeds.values()
    ratio = statistics.median(second / first for first, second in zip(one, two, strict=True))
    print(f"\ntwo servers: {ratio:.2f} times one")
    print(json.dumps({"cached_share": shares, "tok_s": speeds, "ratio": round(ratio, 3)}))


if __name__ == "__main__":
    main()
