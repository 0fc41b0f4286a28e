"""Our engine without a server around it, for what HTTP costs: the same requests, the same streams.

    python engine_alone.py MODEL      then a line of JSON in, a line out, until standard input ends

In: {"prompts": [text], "answers": [tokens], "due": [seconds], "streams": 16 or null}. A request follows
in its stream as soon as the one before it has ended; without streams it comes when it is due.
Out: {"seconds": ..., "began": [...], "came": [[...]], "ended": [...]}, seconds of one clock.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence

from tiny_llm.data import SamplingParams
from tiny_llm.engine.llm import LLM

Plan = Mapping[str, Sequence[float]]


def run(llm: LLM, plan: Plan) -> dict[str, object]:
    """Serve all of a plan."""
    ids = [llm.check(prompt)[0] for prompt in plan["prompts"]]  # type: ignore[arg-type]
    streams, due, size = plan["streams"], plan["due"], len(ids)
    began, ended = [0.0] * size, [0.0] * size
    came: list[list[float]] = [[] for _ in ids]
    numbers: dict[int, int] = {}
    start, at = time.perf_counter(), 0
    while at < size or numbers:
        now = time.perf_counter()
        while at < size and (len(numbers) < streams if streams else start + due[at] <= now):
            params = SamplingParams(max_tokens=int(plan["answers"][at]), ignore_eos=True, speculate=False)
            began[at] = now if streams else start + due[at]
            numbers[llm.engine.add(ids[at], params)] = at
            at += 1
        if not numbers:
            time.sleep(max(0.0, start + due[at] - time.perf_counter()))
            continue
        events = llm.engine.step()
        now = time.perf_counter()
        for number, chunk in events:
            if chunk.text:
                came[numbers[number]].append(now)
            if chunk.completion is not None:
                ended[numbers.pop(number)] = now
    return {"seconds": time.perf_counter() - start, "began": began, "came": came, "ended": ended}


def main() -> None:
    """Answer requests from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    llm = LLM(sys.argv[1], threads=int(os.environ["TINY_LLM_THREADS"]), offline=True)
    for line in sys.stdin:
        print(json.dumps(run(llm, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
