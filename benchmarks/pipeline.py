"""What ranks that work in turns bring: many answers at once by one process, and by two that share the model.

One process with one thread and with two; two ranks of one thread each, as a pipeline and each with a part of
every matrix. All are loaded once and take turns, round by round; medians. Weights are random, of 4 bits. The
tokens of all sides are compared. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from measure.dummy_folder import dummy_folder

from tiny_llm import LLM, SamplingParams
from tiny_llm.distributed.meeting import Ranks
from tiny_llm.weights.hub import resolve

SIDES: Mapping[str, Mapping[str, Any]] = {
    "one thread": {"threads": 1},
    "two threads": {"threads": 2},
    "pipeline": {"threads": 1, "ranks": Ranks(2, shares=())},
    "tensor": {"threads": 1, "ranks": Ranks(2)},
}
PROMPT = 16


def work(side: str, folder: str, tokens: int) -> None:
    """Answer as often as a line with a number of sequences comes."""
    with LLM(folder, **SIDES[side]) as llm:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, speculate=False)
        print("ready", flush=True)
        for number, line in enumerate(sys.stdin):
            prompts = [[(7 * i + 31 * n) % 1000 for n in range(PROMPT)] for i in range(int(line))]
            prompts = [[number, *prompt] for prompt in prompts]  # nothing is found in the prefix cache
            began = time.perf_counter()
            answers = llm.generate(prompts, params)
            seconds = time.perf_counter() - began
            made = repr([answer.token_ids for answer in answers])
            digest = sha256(made.encode()).hexdigest()[:16]
            print(json.dumps({"tok_s": len(prompts) * tokens / seconds, "digest": digest}), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="qwen2-0.5b")
    parser.add_argument("--sequences", default="4,32")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--work", nargs=2)
    args = parser.parse_args()
    if args.work:
        return work(*args.work, args.tokens)
    folder = dummy_folder(args.model, resolve("demo"), Path(tempfile.gettempdir()))
    sides, counts = args.sides.split(","), [int(one) for one in args.sequences.split(",")]
    workers = {side: _start(side, folder, args.tokens) for side in sides}
    found: dict[str, dict[str, float]] = {}
    try:
        for count in counts:
            rounds: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(args.rounds):
                told = {side: _ask(worker, count) for side, worker in workers.items()}
                assert len({one["digest"] for one in told.values()}) == 1, "sides give other tokens"
                for side, one in told.items():
                    rounds[side].append(one["tok_s"])
            found[str(count)] = {side: statistics.median(rates) for side, rates in rounds.items()}
    finally:
        for worker in workers.values():
            worker.communicate()
    print(f"{'sequences':<12}" + "".join(f"{side:>22}" for side in sides))
    for count, rates in found.items():
        first = rates[sides[0]]
        cells = [f"{rate:.1f} tok/s {rate / first:.2f}x" for rate in rates.values()]
        print(f"{count:<12}" + "".join(f"{cell:>22}" for cell in cells))
    print(json.dumps({"benchmark": "pipeline", "model": args.model, "tok_s": found}))


def _start(side: str, folder: Path, tokens: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--work", side, str(folder), "--tokens", str(tokens)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n", f"{side} did not start"
    return worker


def _ask(worker: subprocess.Popen[str], count: int) -> dict[str, Any]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(f"{count}\n")
    worker.stdin.flush()
    told: dict[str, Any] = json.loads(worker.stdout.readline())
    return told


if __name__ == "__main__":
    main()
