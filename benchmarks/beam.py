"""What does a beam search cost? Width W against W sequences of their own, interleaved; medians.

Both have W rows in a step; beams also rank their continuations, part and die, and no step is prepared while
the one before runs. On ``--shape`` with random weights, and on the bundled model, whose steps are so short
that everything beside the model shows. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from tiny_llm import LLM, BeamParams, SamplingParams
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.models.checkpoint import DummyCheckpoint


def seconds_a_step(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> float:
    """Of the steps behind the first tokens, on a fresh engine."""
    engine = llm.with_engine(EngineSettings(kv_blocks=2048, speculate="off")).engine
    for prompt in prompts:
        engine.add(prompt, params)
    rows = params.width if isinstance(params, BeamParams) else len(prompts)
    while engine.scheduler.num_running < rows or engine.totals.generation_tokens < 2 * rows:
        engine.step()
    began, steps = time.perf_counter(), engine.totals.steps
    while len(engine):
        engine.step()
    return (time.perf_counter() - began) / (engine.totals.steps - steps)


def compare(name: str, llm: LLM, width: int, tokens: int, rounds: int) -> dict[str, object]:
    """A row of the table."""
    vocab = llm.config.vocab_size
    prompts = [[(n * 7919 + i * 104729) % vocab for i in range(1, 65)] for n in range(width)]
    apart = SamplingParams(max_tokens=tokens, ignore_eos=True)
    search = BeamParams(width=width, max_tokens=tokens, ignore_eos=True)
    sequences, beams = [], []
    for _ in range(rounds):
        sequences.append(seconds_a_step(llm, prompts, apart))
        beams.append(seconds_a_step(llm, prompts[:1], search))
    ratio = statistics.median(s / b for s, b in zip(sequences, beams, strict=True))
    found: dict[str, object] = {
        "case": name,
        "width": width,
        "sequences_ms_a_step": round(1e3 * statistics.median(sequences), 3),
        "beams_ms_a_step": round(1e3 * statistics.median(beams), 3),
        "ratio": round(ratio, 3),
    }
    print(
        f"{name:<16}{width:>3}{found['sequences_ms_a_step']:>12}{found['beams_ms_a_step']:>10}{ratio:>9.2f}x"
    )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen2-0.5b", help="short name of the random model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--width", type=int, default=4)
    options = parser.parse_args()
    print(f"{'ms a step':<16}{'':>3}{'sequences':>12}{'beams':>10}{'speed':>10}")
    asked = (options.width, options.tokens, options.rounds)
    with LLM(DummyCheckpoint(options.shape), quantize=4) as llm:
        rows = [compare(options.shape, llm, *asked)]
    with LLM("demo") as llm:
        rows.append(compare("demo", llm, *asked))
    print(json.dumps({"benchmark": "beam", "rounds": options.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
