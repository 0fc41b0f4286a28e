"""How long from nothing to the first word? Fresh processes, their wall time, medians.

Prints a table and one JSON line. The disk is warm: the first round is not counted.
The rounds are interleaved, so that a busy moment falls on every row alike.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 7
COMMANDS: Mapping[str, Sequence[str]] = {
    "python": ("-c", "print()"),
    "import mlx.core": ("-c", "import mlx.core; print()"),
    "import tiny_llm": ("-c", "import tiny_llm; print()"),
    "main.py --help": ("main.py", "--help"),
    "main.py generate": ("main.py", "generate", "--prompt", "What is a KV cache?", "--max-tokens", "32"),
}


def first_byte_s(arguments: Sequence[str]) -> float:
    """Seconds from starting python with ``arguments`` to the first byte that it prints."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        taken = time.perf_counter() - began
        process.stdout.read()
    if process.returncode or not first:
        raise SystemExit(f"python {' '.join(arguments)} failed; run it to see why")
    return taken


def main() -> None:
    """Measure and print."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(ROUNDS + 1):
        for name, arguments in COMMANDS.items():
            seconds = first_byte_s(arguments)
            if number:
                taken[name].append(seconds)
    medians = {name: round(statistics.median(values), 3) for name, values in taken.items()}
    print(f"{'to the first byte printed':<28}{'median s':>10}{'min':>8}{'max':>8}")
    for name, values in taken.items():
        print(f"{name:<28}{medians[name]:>10.3f}{min(values):>8.3f}{max(values):>8.3f}")
    print(json.dumps({"benchmark": "startup", "rounds": ROUNDS, "median_s": medians}))


if __name__ == "__main__":
    main()
