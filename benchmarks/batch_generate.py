"""Many prompts at once: ours against mlx_lm.batch_generate, on the bundled model in float32; medians.

A model this small is one that mlx-lm finishes on a CPU. Both get the same prompts, interleaved, and answer
until the model ends or ``--max-tokens``; tok/s counts the answers' tokens and all of the time.
Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from measure.environments import PeerMissing, default_folder, python_of
from measure.sides import numbers
from measure.worker import WORKERS

from tiny_llm import LLM, SamplingParams
from tiny_llm.weights.hub import resolve

QUESTIONS = ("What is a KV cache?", "Tell me a story about a fox.", "What is 34 + 25?", "What is paging?")
Run = Callable[[list[list[int]], int], tuple[float, int]]
"""(prompts, most tokens) -> (seconds, tokens of answers)"""


def ours() -> Run:
    """Our engine; what it remembers of a prompt is forgotten between rounds."""
    llm = LLM("demo", dtype="float32")

    def run(prompts: list[list[int]], most: int) -> tuple[float, int]:
        fresh = llm.with_engine(llm.engine.settings)
        began = time.perf_counter()
        answers = fresh.generate(prompts, SamplingParams(max_tokens=most, speculate=False))
        return time.perf_counter() - began, sum(len(answer.token_ids) for answer in answers)

    return run


@contextmanager
def mlx_lm(folder: Path) -> Iterator[Run]:
    """mlx-lm in its own environment. Raises PeerMissing without one."""
    command = [python_of("mlx-lm", folder), WORKERS / "mlxlm_batch.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        stdin, stdout = child.stdin, child.stdout

        def run(prompts: list[list[int]], most: int) -> tuple[float, int]:
            asked = {"folder": str(resolve("demo")), "prompts": prompts, "max_tokens": most}
            print(json.dumps(asked), file=stdin, flush=True)
            answer = json.loads(stdout.readline())
            return float(answer["seconds"]), int(answer["tokens"])

        yield run
        stdin.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=numbers, default=(1, 4, 16), help="at once, with commas between")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=default_folder(), help="where peers.py made them")
    options = parser.parse_args()
    try:
        with mlx_lm(options.folder) as theirs:
            results = compare(ours(), theirs, options)
    except PeerMissing as missing:
        parser.error(f"mlx-lm is missing: {missing}")
    print(json.dumps({"benchmark": "batch_generate", "results": results}))


def compare(mine: Run, theirs: Run, options: argparse.Namespace) -> list[dict[str, float]]:
    """Both in turns, for each number of prompts."""
    llm = LLM("demo")
    print(f"{'prompts':>8}{'ours tok/s':>12}{'mlx-lm':>10}{'ratio':>8}")
    results = []
    for count in options.prompts:
        asked = [QUESTIONS[i % len(QUESTIONS)] + " " * (i // len(QUESTIONS)) for i in range(count)]
        prompts = [llm.chat_prompt([{"role": "user", "content": question}]) for question in asked]
        rates: tuple[list[float], list[float]] = ([], [])
        for number in range(options.rounds + 1):
            for run, found in zip((mine, theirs), rates, strict=True):
                seconds, tokens = run(prompts, options.max_tokens)
                if number:  # the first round only warms up
                    found.append(tokens / seconds)
        own, other = map(statistics.median, rates)
        print(f"{count:>8}{own:>12.1f}{other:>10.1f}{own / other:>7.2f}x")
        results.append({"prompts": count, "ours": own, "mlx_lm": other, "ratio": own / other})
    return results


if __name__ == "__main__":
    main()
