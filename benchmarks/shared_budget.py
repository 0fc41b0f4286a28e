"""What does one memory for three models bring, where one of them is busy? The others are idle, or nearly.

Copies of one model, each with a third of the memory, or all with shares of one budget; interleaved, medians.
Prints a table. Tokens are counted by seconds of processor time, which others on the machine do not take.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from statistics import median

from tiny_llm import LLM, AsyncLLM, SamplingParams
from tiny_llm.engine.budget import MemoryBudget

MODELS = 3


async def asked(llms: list[AsyncLLM], options: argparse.Namespace, light: bool) -> tuple[float, ...]:
    """The busy one's tokens a second, most at once, seconds to a first token; a light one's milliseconds."""
    params = SamplingParams(max_tokens=options.tokens, ignore_eos=True, seed=1)
    running = [0]
    engine, waits, firsts = llms[0].llm.engine, list[float](), list[float]()
    llms[0].after_step = lambda: running.append(engine.scheduler.num_running)
    begun, start = time.process_time(), time.perf_counter()

    async def answer(prompt: list[int]) -> None:
        stream = llms[0].stream(prompt, params)
        await anext(stream)
        firsts.append(time.perf_counter() - start)
        async for _ in stream:
            pass

    busy = asyncio.gather(*(answer([9 + i] * options.prompt) for i in range(options.requests)))

    async def now_and_then() -> None:
        while not busy.done():
            asked_at = time.perf_counter()
            await llms[1].generate([7] * 40, SamplingParams(max_tokens=8, ignore_eos=True))
            waits.append(time.perf_counter() - asked_at)
            await asyncio.sleep(0.2)

    await asyncio.gather(busy, *([now_and_then()] if light else []))
    rate = options.requests * options.tokens / (time.process_time() - begun)
    for llm in llms:
        await llm.call(lambda one: one.engine.rest())
    return rate, max(running), median(firsts), 1e3 * median(waits or [0.0])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--blocks", type=int, default=192, help="of the memory")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with LLM(options.model) as llm:
        budget = MemoryBudget(options.blocks * llm.engine.block_bytes, MODELS)
    sides = {
        "each a third": [AsyncLLM(options.model, kv_memory=budget.part) for _ in range(MODELS)],
        "one budget": [AsyncLLM(options.model, kv_memory=budget.share()) for _ in range(MODELS)],
    }
    print("memory       | others       | tokens/s | at once | first token | a light one's answer")
    for light in (False, True):
        rounds = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, llms in sides.items():
                rounds[name].append(asyncio.run(asked(llms, options, light)))
        for name, found in rounds.items():
            rate, running, first, wait = (median(one) for one in zip(*found, strict=True))
            told = f"{wait:.0f} ms" if light else ""
            others = "now and then" if light else "idle"
            print(f"{name:12} | {others:12} | {rate:8.0f} | {running:7.0f} | {first:9.2f} s | {told}")
    for llms in sides.values():
        for llm in llms:
            llm.close()


if __name__ == "__main__":
    main()
