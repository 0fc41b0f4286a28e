"""How long from process start to the first token of a model, and to ``import tiny_llm``?

    python benchmarks/first_token.py [--model demo] [--runs 7]

Each run is a new process: ``main.py generate`` with its stdout in a pipe, timed until the first
character arrives. Prints a table and one JSON line. The first run, which may read from a cold
disk, is shown apart from the median of the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def first_token_s(model: str) -> float:
    """Seconds from starting the process to the first byte of its answer."""
    command = [sys.executable, "main.py", "generate", "--model", model, "--prompt", "What is a KV cache?"]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        if not child.stdout.read(1):
            raise SystemExit(f"error: {' '.join(command)} answered nothing")
        seconds = time.perf_counter() - began
        child.kill()
    return seconds


def import_s(module: str) -> float:
    """Seconds that a fresh interpreter takes to import a module, its own start left out."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    return float(done.stdout)


def measure(question: Callable[[], float], runs: int) -> dict[str, float]:
    """The first run, and the median, best and worst of ``runs`` more; milliseconds."""
    first, *rest = [1000 * question() for _ in range(runs + 1)]
    figures = {"first": first, "median": statistics.median(rest), "best": min(rest), "worst": max(rest)}
    return {name: round(value, 1) for name, value in figures.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    rows = {
        "process start to first token": measure(lambda: first_token_s(options.model), options.runs),
        "import tiny_llm": measure(lambda: import_s("tiny_llm"), options.runs),
        "import mlx.core": measure(lambda: import_s("mlx.core"), options.runs),
    }
    print(f"{'milliseconds':<30} {'first':>8} {'median':>8} {'best':>8} {'worst':>8}")
    for name, row in rows.items():
        print(f"{name:<30} " + " ".join(f"{value:>8.1f}" for value in row.values()))
    print(json.dumps({"benchmark": "first_token", "model": options.model, "runs": options.runs, "ms": rows}))


if __name__ == "__main__":
    main()
