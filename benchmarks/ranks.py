"""What travels between ranks that share a model, against the formula, and what a collective costs here.

Three processes' worth: one rank, two over sockets, two by MLX's ring, each with one thread, one after the
other in each round; medians. Bytes and messages are counted at rank 0, where sockets carry them; what a step
takes outside of our kernels, over its collectives, is what they cost. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from tiny_llm import LLM, SamplingParams
from tiny_llm.models.ranks import gathered_bytes
from tiny_llm.ops.backend import kernel_seconds, use
from tiny_llm.planning.memory import find_config

SIDES = ("one rank", "sockets", "ring")


class Counted:
    """A group's gathers, counted: what came from others, in how many messages, and seconds."""

    def __init__(self, group: Any) -> None:
        self._real, self._others = group.all_gather, group.size - 1
        self.bytes = self.messages = self.gathers = 0
        self.seconds = 0.0

    def __call__(self, x: mx.array) -> mx.array:
        """Gather."""
        began = time.perf_counter()
        gathered: mx.array = self._real(x)
        self.seconds += time.perf_counter() - began
        if x.size:
            self.bytes += x.nbytes * self._others
            self.messages += self._others
            self.gathers += 1
        return gathered


def work(side: str, args: argparse.Namespace) -> None:
    """One side, in a process of its own: a line of JSON."""
    ranks = args.ranks if side == "sockets" else None if side == "ring" else 1
    params = SamplingParams(max_tokens=args.tokens, ignore_eos=True, speculate=False)
    prompt = [5 + i % 100 for i in range(16)]
    with LLM(args.model, quantize=args.quantize, threads=1, ranks=ranks) as llm:
        llm.generate(prompt, SamplingParams(max_tokens=8, ignore_eos=True))
        team = llm._team
        counted = None if team is None else Counted(team.group)
        if team is not None:
            team.group.all_gather = counted  # type: ignore[method-assign, assignment]
        with use(llm.backend):
            kernels, before = kernel_seconds() or 0.0, llm.engine.totals.steps
            began = time.perf_counter()
            llm.generate([prompt[0] + 1, *prompt[1:]], params)
            took, inside = time.perf_counter() - began, (kernel_seconds() or 0.0) - kernels
        steps = llm.engine.totals.steps - before
        told: dict[str, object] = {"ms_a_step": 1e3 * took / steps}
        told["outside_ms"] = 1e3 * (took - inside) / steps
        if team is not None and counted is not None:
            # A step ahead begins with its tokens: 4 bytes of each rank, in a gather of its own.
            ahead = counted.gathers - steps * gathered_bytes(find_config(args.model), team.size).gathers
            formula = gathered_bytes(find_config(args.model), team.size)
            rows = args.tokens
            want = formula.token * (len(prompt) + args.tokens - 1) + formula.logits * rows
            told |= {"gathers_a_step": counted.gathers / steps, "messages": counted.messages}
            told |= {"bytes": counted.bytes, "formula_bytes": want + 4 * ahead * (team.size - 1)}
            told |= {"bytes_a_token": counted.bytes / (len(prompt) + args.tokens - 1)}
        print(json.dumps(told), flush=True)


def run(side: str, args: argparse.Namespace) -> dict[str, float]:
    """What the worker of a side says."""
    launcher = Path(sys.executable).parent / "mlx.launch"
    before = [str(launcher), "-n", str(args.ranks), "--backend", "ring", "--python", sys.executable, "--"]
    command = [str(Path(__file__)), "--side", side, "--model", args.model, "--tokens", str(args.tokens)]
    command += ["--ranks", str(args.ranks)] + (["--quantize", str(args.quantize)] if args.quantize else [])
    home = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": home}
    done = subprocess.run(
        [*(before if side == "ring" else [sys.executable]), *command],
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        env=environment,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--quantize", type=int, default=None)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES)
    args = parser.parse_args()
    if args.side:
        return work(args.side, args)
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            rounds[side].append(run(side, args))
    found = {
        side: {name: statistics.median(one[name] for one in ran) for name in ran[0]}
        for side, ran in rounds.items()
    }
    alone = found["one rank"]["outside_ms"]
    heads = f"{'ms a step':>11}{'outside of kernels':>20}{'ms a collective':>17}{'bytes':>12}{'formula':>12}"
    print(f"{'':<10}{heads}")
    for side, told in found.items():
        line = f"{side:<10}{told['ms_a_step']:>11.2f}{told['outside_ms']:>20.2f}"
        if "bytes" in told:
            told["collective_ms"] = (told["outside_ms"] - alone) / told["gathers_a_step"]
            line += f"{told['collective_ms']:>17.3f}{told['bytes']:>12,.0f}{told['formula_bytes']:>12,.0f}"
        print(line)
    print(json.dumps({"model": args.model, "ranks": args.ranks, "sides": found}))


if __name__ == "__main__":
    main()
