"""How near does a whole model come to what its config and three speeds of this machine predict?

The speeds are of our own operations, large and alone (tiny_llm/planning/speed.py). Machine and model are
measured in turns, and medians count, so that what others take of the machine is taken from both.
Random weights of 4 bits, one sequence. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from statistics import median

from measure.sides import numbers

from tiny_llm.engine.llm import LLM
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.ops.backend import set_threads, use
from tiny_llm.planning.bench import Task, measure
from tiny_llm.planning.speed import FORMAT, Machine, Speed, measure_machine, predict

ANSWER = 16


def middle(machines: Sequence[Machine]) -> Machine:
    """The median of each speed."""
    return Machine(
        median(m.bytes_s for m in machines),
        median(m.matrix_flops_s for m in machines),
        median(m.attention_flops_s for m in machines),
    )


def compare(shape: str, prompts: Sequence[int], rounds: int) -> Iterator[tuple[int, Machine, Speed, Speed]]:
    """For each length of prompt: the machine, and the speed predicted and measured."""
    llm = LLM(DummyCheckpoint(shape), quantize=FORMAT.bits)
    for prompt in prompts:
        task = Task(shape, "dummy", FORMAT.bits, prompt_tokens=prompt, new_tokens=ANSWER, rounds=1)
        machines, speeds = [], []
        for _ in range(rounds):
            machines.append(measure_machine(5))
            speeds.append(measure(llm, task))
        machine = middle(machines)
        measured = Speed(median(s.prefill_tok_s for s in speeds), median(s.decode_tok_s for s in speeds))
        yield (
            prompt,
            machine,
            predict(llm.config, machine, quantize=FORMAT, prompt=prompt, answer=ANSWER),
            measured,
        )


def line(shape: str, prompt: int, machine: Machine, predicted: Speed, measured: Speed) -> str:
    """A row of the table."""
    speeds = (machine.bytes_s, machine.matrix_flops_s, machine.attention_flops_s)
    read, matrices, attention = (speed / 1e9 for speed in speeds)
    return (
        f"{shape:<11}{prompt:>7}{read:>8.1f}{matrices:>10.0f}{attention:>11.0f}"
        f"{predicted.prefill:>11.0f}{measured.prefill:>6.0f}{predicted.decode:>11.1f}{measured.decode:>6.1f}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="qwen2-0.5b,qwen2-1.5b", help="short names, with commas between")
    parser.add_argument("--context", type=numbers, default=(512, 2048), help="lengths of prompts")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    set_threads(options.threads)
    rows = []
    print(f"{'':<18}{'read':>8}{'matrices':>10}{'attention':>11}{'prefill, tok/s':>17}{'decode, tok/s':>17}")
    print(
        f"{'':<11}{'prompt':>7}{'GB/s':>8}{'GFLOP/s':>10}{'GFLOP/s':>11}{'roof':>11}{'is':>6}{'roof':>11}{'is':>6}"
    )
    with use(None):
        for shape in options.shapes.split(","):
            for prompt, machine, predicted, measured in compare(shape, options.context, options.rounds):
                print(line(shape, prompt, machine, predicted, measured), flush=True)
                ratios = {
                    "prefill": round(measured.prefill / predicted.prefill, 3),
                    "decode": round(measured.decode / predicted.decode, 3),
                }
                rows.append({"shape": shape, "prompt": prompt, "is_over_predicted": ratios})
    print(json.dumps({"benchmark": "roofline", "rows": rows}))


if __name__ == "__main__":
    main()
