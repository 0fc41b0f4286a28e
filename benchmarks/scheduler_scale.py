"""What does scheduling cost, and how often does a prefix hit? The scheduler and block manager, no model.

Requests are those of the Mooncake traces (FAST'25): real lengths, and prompts as hashes of blocks of 512
tokens, which become tokens here. A model that answers at once stands in for the real one, so that what
is timed is ``add``, ``schedule`` and ``commit`` alone (with ``speed.observe``). First a number of
sequence-steps at 10, 100 and 1,000 concurrent sequences, in rounds that take turns; then ``--requests``
requests through 1,000; then the hit rate of each trace with a pool that never evicts. As in a server,
what is there from the start is hidden from the garbage collector. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

from tiny_llm.data import Advance, Plan, SamplingParams, Sequence
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.memory import peak_memory_bytes
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import SchedulerSettings

HASHED = 512  # tokens of a hash in the traces
ROUNDS = 3
PUBLISHED = {"conversation": 37.4, "synthetic": 65.1}
ANSWER = 1 << 30  # tokens of answers are unlike any of a prompt


@dataclass(frozen=True, slots=True)
class Request:
    """A line of a trace: what its prompt's blocks are called, and both lengths in tokens."""

    hashes: list[int]
    prompt: int
    answer: int


@dataclass(slots=True)
class Cost:
    """What was done, and the seconds that it took."""

    steps: int = 0
    sequence_steps: int = 0
    add_s: float = 0.0
    schedule_s: float = 0.0
    commit_s: float = 0.0
    peak_running: int = 0
    preempted: dict[str, int] = field(default_factory=dict)

    @property
    def us(self) -> float:
        """Microseconds of all three a sequence-step."""
        return 1e6 * (self.add_s + self.schedule_s + self.commit_s) / self.sequence_steps

    @property
    def steps_s(self) -> float:
        """Steps a second."""
        return self.steps / (self.add_s + self.schedule_s + self.commit_s)


def read_trace(name: str) -> list[Request]:
    """A trace in its order of arrival."""
    folder = Path(os.environ.get("TINY_LLM_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    path = folder / "traces" / f"mooncake_{name}.jsonl"
    if not path.is_file():
        raise SystemExit(f"no trace at {path}: set TINY_LLM_DATA to the folder that has traces/")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [Request(r["hash_ids"], r["input_length"], max(1, r["output_length"])) for r in lines]


def forever(trace: list[Request]) -> Iterator[Request]:
    """The trace again and again, each time with hashes of its own."""
    names = 1 + max(max(request.hashes) for request in trace)
    for again in count():
        for request in trace:
            yield Request([h + again * names for h in request.hashes], request.prompt, request.answer)


def sequence(number: int, request: Request) -> Sequence:
    """The request with tokens for its hashes."""
    tokens = array("i", [h for h in request.hashes for _ in range(HASHED)][: request.prompt])
    return Sequence(number, tokens, SamplingParams(max_tokens=request.answer), arrival=float(number))


def answers(scheduler: Scheduler, plan: Plan) -> list[Advance]:
    """A token for each that is up to date, and the end where the trace has it."""
    advances = []
    for item in plan.items:
        if item.logit_rows:
            seq = scheduler.sequence(item.seq_id)
            assert seq is not None
            last = len(seq.tokens) + 1 == seq.prompt_len + seq.params.max_tokens
            advances.append(Advance(seq.id, (ANSWER + seq.id,), "length" if last else None))
    return advances


def serve(scheduler: Scheduler, requests: Iterator[Request], concurrent: int, most: float) -> Cost:
    """Keep ``concurrent`` sequences going until the requests or ``most`` sequence-steps are through."""
    cost, numbers = Cost(), count()
    tick = time.perf_counter
    while cost.sequence_steps < most:
        arrivals = [sequence(next(numbers), r) for r in islice(requests, concurrent - len(scheduler))]
        began = tick()
        for seq in arrivals:
            scheduler.add(seq)
        added = tick()
        plan = scheduler.schedule()
        planned = tick()
        if not plan.items:
            break
        advances = answers(scheduler, plan)
        decided = tick()
        scheduler.commit(plan, advances)
        scheduler.speed.observe(plan, 1.0)
        cost.commit_s += tick() - decided
        cost.schedule_s += planned - added
        cost.add_s += added - began
        cost.steps += 1
        cost.sequence_steps += len(plan.items)
        cost.peak_running = max(cost.peak_running, scheduler.num_running)
    cost.preempted = dict(scheduler.preempted)
    return cost


def new_scheduler(concurrent: int, block_size: int, blocks: int) -> Scheduler:
    """Room for ``concurrent`` sequences, and a budget with which prompts keep up with decodes."""
    settings = SchedulerSettings(
        max_num_seqs=concurrent,
        max_num_batched_tokens=33 * concurrent,
        max_step_ms=1e9,
        max_queued_requests=concurrent,
    )
    return Scheduler(BlockManager(block_size, blocks, slab=4096), settings)


def pool(concurrent: int, block_size: int) -> int:
    """Blocks for as many sequences of the trace's mean length, and half as much again; at least for one."""
    return 260 * HASHED // block_size + concurrent * 18_000 // block_size


def row(name: str, cost: Cost) -> str:
    parts = (1e6 * s / cost.sequence_steps for s in (cost.add_s, cost.schedule_s, cost.commit_s))
    figures = "".join(f"{part:>10.2f}" for part in (*parts, cost.us))
    preempted = sum(cost.preempted.values())
    return f"{name:<16}{cost.steps:>9,}{cost.steps_s:>9,.0f}{figures}{cost.peak_running:>10,}{preempted:>11,}"


def growth(trace: list[Request], block_size: int, steps: int) -> dict[int, float]:
    """Microseconds a sequence-step at each concurrency: medians of rounds, printed with their last round."""
    taken: dict[int, list[Cost]] = {10: [], 100: [], 1000: []}
    for _ in range(ROUNDS):
        for concurrent, costs in taken.items():
            scheduler = new_scheduler(concurrent, block_size, pool(concurrent, block_size))
            costs.append(serve(scheduler, forever(trace), concurrent, steps))
    for concurrent, costs in taken.items():
        print(row(f"{concurrent:,}", sorted(costs, key=lambda cost: cost.us)[ROUNDS // 2]), flush=True)
    return {n: statistics.median(cost.us for cost in costs) for n, costs in taken.items()}


def hit_rate(name: str, block_size: int) -> float:
    """Percent of the trace's prompt tokens found in the cache, of a pool that never evicts."""
    trace = read_trace(name)
    tokens = sum(request.prompt + request.answer for request in trace)
    scheduler = new_scheduler(100, block_size, tokens // block_size + len(trace))
    serve(scheduler, iter(trace), 100, float("inf"))
    prefix = scheduler.blocks.prefix
    assert prefix is not None
    return 100 * prefix.hit_tokens / (prefix.hit_tokens + prefix.miss_tokens)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000, help="in the long run")
    parser.add_argument(
        "--sequence-steps", type=int, default=1_000_000, help="in each round of the short ones"
    )
    parser.add_argument("--block-size", type=int, default=HASHED, help="tokens a block")
    options = parser.parse_args()
    conversation = read_trace("conversation")
    gc.freeze()
    head = "".join(f"{name:>10}" for name in ("add us", "schedule", "commit", "sum"))
    print(f"{'concurrent':<16}{'steps':>9}{'steps/s':>9}{head}{'running':>10}{'preempted':>11}")
    us = growth(conversation, options.block_size, options.sequence_steps)
    before = peak_memory_bytes()
    scheduler = new_scheduler(1000, options.block_size, pool(1000, options.block_size))
    long = serve(scheduler, islice(forever(conversation), options.requests), 1000, float("inf"))
    memory = peak_memory_bytes() - before
    print(row(f"{options.requests:,} through", long), flush=True)
    hits = {name: hit_rate(name, options.block_size) for name in PUBLISHED}
    print(
        f"growth from 10 to 1,000: {us[1000] / us[10]:.2f}x; memory of the long run {memory / 2**20:,.0f} MiB"
    )
    for name, rate in hits.items():
        print(f"{name} trace: {rate:.1f} % of prompt tokens hit, published {PUBLISHED[name]} %")
    result = {
        "benchmark": "scheduler_scale",
        "block_size": options.block_size,
        "us_a_sequence_step": {str(n): round(value, 2) for n, value in us.items()},
        "requests": options.requests,
        "long_run": {
            "us": round(long.us, 2),
            "steps_s": round(long.steps_s),
            "memory_mib": round(memory / 2**20),
        },
        "hit_rate": {name: round(rate, 2) for name, rate in hits.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
