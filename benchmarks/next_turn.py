"""How soon does the next turn of a conversation begin? With all of it kept, and where thinking is left out.

A model of random weights, 4 bits. A first turn of --prompt tokens is answered by --thought tokens of thinking
and --answer tokens. The second turn's prompt has the first, the answer and a question; templates of models
that think (Qwen3, DeepSeek-R1) leave earlier thinking out, so what stands behind it is computed anew. Time to
its first token, against computing all of it; rounds in turns, medians. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics

from tiny_llm import LLM, SamplingParams
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.models.checkpoint import DummyCheckpoint


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2-0.5b")
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--thought", type=int, default=48)
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--question", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    chance = random.Random(0)
    llm = LLM(DummyCheckpoint(given.shape), quantize=4, kv_memory=2**30, speculate="off")
    one = SamplingParams(max_tokens=1, ignore_eos=True)
    whole = SamplingParams(max_tokens=given.thought + given.answer, temperature=0, ignore_eos=True)
    taken: dict[str, list[float]] = {"all is kept": [], "thinking is left out": [], "all is computed": []}
    cached: dict[str, int] = {}
    for _ in range(given.rounds):
        prompt = [chance.randrange(5000) for _ in range(given.prompt)]
        question = [chance.randrange(5000) for _ in range(given.question)]
        own = llm.with_engine(EngineSettings(kv_blocks=1024, speculate="off"))
        (said,) = own.generate([prompt], whole)
        turns = {
            "all is kept": prompt + said.token_ids + question,
            "thinking is left out": prompt + said.token_ids[given.thought :] + question,
        }
        for what, turn in turns.items():
            (answer,) = own.generate([turn], one)
            taken[what].append(answer.timing.ttft_s)
            cached[what] = answer.cached_tokens
        own = llm.with_engine(EngineSettings(kv_blocks=1024, speculate="off"))
        (answer,) = own.generate([turns["thinking is left out"]], one)
        taken["all is computed"].append(answer.timing.ttft_s)
        cached["all is computed"] = answer.cached_tokens
    medians = {what: statistics.median(seconds) for what, seconds in taken.items()}
    print(f"second turn after {given.prompt} tokens, {given.shape} | first token | cached tokens | sooner")
    for what, seconds in medians.items():
        sooner = medians["all is computed"] / seconds
        print(f"{what:40} | {1e3 * seconds:8.0f} ms | {cached[what]:13} | {sooner:5.1f}x")
    print(json.dumps({"benchmark": "next_turn", "shape": given.shape, "seconds": medians, "cached": cached}))


if __name__ == "__main__":
    main()
