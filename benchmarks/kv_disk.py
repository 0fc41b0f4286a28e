"""How much sooner does an answer begin that finds its prompt on disk? And what does writing there cost?

A model of random weights in the shape of --shape, 4 bits. Its prompt is computed, the engine is made anew,
the same prompt is read from disk: in turns, medians. Then many short prompts run through a pool that is too
small for them, with a disk and without, in turns: the tokens per second of both.
Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from tiny_llm import LLM, SamplingParams
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.models.checkpoint import DummyCheckpoint

ONE = SamplingParams(max_tokens=1, ignore_eos=True)


def first_token_s(llm: LLM, prompt: list[int]) -> float:
    """Seconds to the first token on an engine that has seen nothing."""
    own = llm.with_engine(llm.engine.settings)
    (answer,) = own.generate([prompt], ONE)
    own.engine.keep_cached()
    return answer.timing.ttft_s


def decode_rate(llm: LLM, prompts: list[list[int]], settings: EngineSettings) -> float:
    """Tokens per second of all prompts at once, computed and made, while the pool gives blocks up."""
    own = llm.with_engine(settings)
    began = time.perf_counter()
    answers = own.generate(prompts, SamplingParams(max_tokens=32, ignore_eos=True, temperature=0))
    made = sum(len(one.token_ids) + len(one.prompt_token_ids) for one in answers)
    return made / (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2-0.5b")
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    chance = random.Random(0)
    prompt = [chance.randrange(5000) for _ in range(given.prompt)]
    with tempfile.TemporaryDirectory() as folder:
        options = {"quantize": 4, "kv_memory": 2**30, "speculate": "off"}
        plain = LLM(DummyCheckpoint(given.shape), **options)  # type: ignore[arg-type]
        disk = LLM(DummyCheckpoint(given.shape), kv_disk=Path(folder) / "kv", **options)  # type: ignore[arg-type]
        first_token_s(disk, prompt)  # what is written here is read below
        computed, read = [], []
        for _ in range(given.rounds):
            computed.append(first_token_s(plain, prompt))
            read.append(first_token_s(disk, prompt))
        small = EngineSettings(kv_blocks=24, speculate="off")
        without, with_disk = [], []
        for _ in range(2 * given.rounds):
            prompts = [[chance.randrange(5000) for _ in range(96)] for _ in range(8)]
            without.append(decode_rate(plain, prompts, small))
            with_disk.append(decode_rate(disk, prompts, small))
        usage = disk.engine.stats().disk
        assert usage is not None
        disk.close()
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir(exist_ok=True)
    ttft, found = statistics.median(computed), statistics.median(read)
    slower = statistics.median(a / b for a, b in zip(without, with_disk, strict=True)) - 1
    print(
        f"first token of {given.prompt}: computed {ttft:.2f} s, from disk {found:.2f} s, {ttft / found:.1f}x"
    )
    print(
        f"while blocks are written, steps take {100 * slower:+.1f} %: "
        f"{usage.written} written, {usage.dropped} dropped"
    )
    told = {"computed_s": ttft, "read_s": found, "ratio": ttft / found, "slower": slower, **usage._asdict()}
    print(json.dumps({"benchmark": "kv_disk", "shape": given.shape, "prompt": given.prompt, **told}))


if __name__ == "__main__":
    main()
