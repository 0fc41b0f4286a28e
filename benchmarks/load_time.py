"""How long from a checkpoint on disk to the first token, over the time that reading its file takes?

Writes a random 4-bit checkpoint in the shapes of ``--model`` to a temporary folder. Each round reads the file
and, in a fresh process, loads the model and makes a token after a prompt of one; imports are not counted.
"cold" means that the system was asked to forget the file first (Linux). Medians; prints a table and one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from measure.dummy_folder import write_dummy

from tiny_llm.data import SamplingParams
from tiny_llm.decoding.generate import generate
from tiny_llm.kv.dense import DenseCache
from tiny_llm.memory import peak_memory_bytes
from tiny_llm.models.loading import load_model
from tiny_llm.ops.backend import set_threads

PIECE = 16 << 20


def forget(file: Path) -> None:
    """Ask the system to read the file from disk next time."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_s(file: Path) -> float:
    """Seconds to read the file through one buffer, and do nothing with it."""
    buffer = bytearray(PIECE)
    began = time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass
    return time.perf_counter() - began


def load_once(folder: Path) -> None:
    """In the child: load, make a token, and print the figures as JSON."""
    mx.eval(mx.zeros((1,)) + 1)  # the backend's own start is not the loader's
    before, began = peak_memory_bytes(), time.perf_counter()
    model = load_model(folder)
    loaded = time.perf_counter()
    next(generate(model, DenseCache(model.config.num_layers, mx.bfloat16), [1], SamplingParams()))
    figures = {
        "load_s": loaded - began,
        "first_token_s": time.perf_counter() - began,
        "peak_bytes": peak_memory_bytes() - before,
    }
    print(json.dumps(figures))


def run_child(folder: Path) -> dict[str, float]:
    """``load_once`` in a process of its own."""
    command = [sys.executable, __file__, "--child", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def measure(file: Path, rounds: int, cold: bool) -> dict[str, float]:
    """Medians of reading the weights' file and of loading its folder, which take turns."""
    reads, loads = [], []
    for _ in range(rounds):
        if cold:
            forget(file)
        reads.append(read_s(file))
        if cold:
            forget(file)
        loads.append(run_child(file.parent))
    found = {name: statistics.median(load[name] for load in loads) for name in loads[0]}
    read = statistics.median(reads)
    size = file.stat().st_size
    ratios = {"ratio": found["first_token_s"] / read, "peak_ratio": found["peak_bytes"] / size}
    return {"read_s": read, **found, **ratios}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2-1.5b", help="short name whose shapes to use")
    parser.add_argument("--threads", type=int, help="the physical cores by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_threads(options.threads)
    if options.child:
        load_once(Path(options.child))
        return
    can_forget = hasattr(os, "posix_fadvise")
    results = {}
    print(f"{'':<8}{'read s':>10}{'load s':>10}{'token s':>10}{'ratio':>8}{'peak over the file':>20}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_dummy(folder, options.model)
        for state in ("warm", "cold")[: 1 + can_forget]:
            found = results[state] = measure(file, options.rounds, state == "cold")
            times = "".join(f"{found[key]:>10.3f}" for key in ("read_s", "load_s", "first_token_s"))
            print(f"{state:<8}{times}{found['ratio']:>8.2f}{found['peak_ratio']:>20.3f}")
    print(json.dumps({"benchmark": "load_time", "model": options.model, "results": results}))


if __name__ == "__main__":
    main()
