"""What does somebody who watches the engine through the page cost it? Speed with and without, in turns.

Sixteen sequences of the bundled model, which makes the smallest steps there are, and watchers of /live's
pictures beside them. Wall time and the process's own CPU time; the medians of each pair's difference.
Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import aclosing
from statistics import median
from typing import NamedTuple

from measure.machine import foreign_share_now, warning

from tiny_llm.data import SamplingParams
from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.server.live import Live
from tiny_llm.server.service import Service
from tiny_llm.server.settings import ServerSettings

SEQUENCES, PROMPT = 16, 32


class Round(NamedTuple):
    """Seconds of one round, by two clocks, and the pictures that were taken."""

    wall: float
    cpu: float
    pictures: int


async def watch(live: Live, seen: list[bytes]) -> None:
    """Take every picture, as a page does."""
    async with aclosing(await live.watch()) as events:
        async for event in events:
            seen.append(event)


async def one_round(engine: AsyncLLM, live: Live, watchers: int, tokens: int) -> Round:
    """Answer all prompts while ``watchers`` watch."""
    seen: list[bytes] = []
    tasks = [asyncio.ensure_future(watch(live, seen)) for _ in range(watchers)]
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, speculate=False)
    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(engine.generate([1 + number] * PROMPT, params) for number in range(SEQUENCES)))
    spent = Round(time.perf_counter() - wall, time.process_time() - cpu, len(seen))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return spent


async def measure(watchers: int, tokens: int, rounds: int) -> Mapping[str, float]:
    """Rounds with and without watchers, in turns; each pair begins with the other one."""
    service = Service(ServerSettings(), lambda: AsyncLLM("demo"))
    await service.start()
    live = Live(service)
    await one_round(service.engine, live, watchers, tokens)
    pairs = []
    for number in range(rounds):
        order = (0, watchers) if number % 2 else (watchers, 0)
        pair = {count: await one_round(service.engine, live, count, tokens) for count in order}
        pairs.append((pair[0], pair[watchers]))
    await service.close()
    made = SEQUENCES * tokens
    return {
        "alone_tok_s": round(median(made / alone.wall for alone, _ in pairs), 1),
        "watched_tok_s": round(median(made / watched.wall for _, watched in pairs), 1),
        "wall_cost_percent": round(median(100 * (b.wall / a.wall - 1) for a, b in pairs), 2),
        "cpu_cost_percent": round(median(100 * (b.cpu / a.cpu - 1) for a, b in pairs), 2),
        "pictures_a_second": round(median(b.pictures / b.wall for _, b in pairs) / watchers, 2),
    }


def main() -> None:
    """Measure and print."""
    options_of = argparse.ArgumentParser(description=__doc__)
    options_of.add_argument("--watchers", type=int, nargs="+", default=[1, 8])
    options_of.add_argument("--tokens", type=int, default=800, help="of an answer")
    options_of.add_argument("--rounds", type=int, default=15)
    options = options_of.parse_args()
    if said := warning(foreign_share_now(), "before the start"):
        print(said)
    print(f"{'watchers':>8} {'alone':>9} {'watched':>9} {'wall':>8} {'CPU':>8} {'pictures/s':>11}")
    found = {}
    for watchers in options.watchers:
        row = asyncio.run(measure(watchers, options.tokens, options.rounds))
        found[watchers] = row
        print(
            f"{watchers:>8} {row['alone_tok_s']:>9} {row['watched_tok_s']:>9} {row['wall_cost_percent']:>7} %"
            f" {row['cpu_cost_percent']:>6} % {row['pictures_a_second']:>11}"
        )
    print(
        json.dumps(
            {"benchmark": "watching", "tokens": options.tokens, "rounds": options.rounds, "watchers": found}
        )
    )


if __name__ == "__main__":
    main()
