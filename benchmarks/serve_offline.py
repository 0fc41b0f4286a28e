"""How do many requests fare together? Lengths of real conversations, at once and as they come; no network.

``--requests`` requests have lengths drawn from the Azure 2023 conversation trace (Patel et al. 2024,
Splitwise), scaled to ``--longest`` tokens at most. They come all at once, which measures the capacity, and
then at random (Poisson) at 60 % and 90 % of it; with and without prompts being read in chunks between the
tokens of others. Goodput is how many requests a second had their first token within ``--ttft`` seconds and
95 % of the others within ``--itl`` milliseconds of the one before. Then: requests that share a system
prompt, with and without the prefix cache; and the gaps between the tokens of others while one prompt of
8,192 tokens is read. Random weights of 4 bits. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from measure.engine import BITS, data_folder, engine_of
from measure.machine import Watch, foreign_share_now, warning
from measure.serving import Asked, figures, poisson, trace_lengths

from tiny_llm.data import SamplingParams
from tiny_llm.engine.engine import Engine
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.models.loading import load_model
from tiny_llm.models.registry import Model
from tiny_llm.ops.backend import set_threads, use
from tiny_llm.scheduler.settings import SchedulerSettings

SYSTEM, QUESTION, ANSWER = 512, 32, 8
LONG, OTHERS = 8192, 4
SHOWN = (
    "tok_s",
    "ttft_p50_ms",
    "ttft_p95_ms",
    "ttft_p99_ms",
    "itl_p50_ms",
    "itl_p95_ms",
    "itl_p99_ms",
    "goodput_s",
)
SHARES = (0.6, 0.9)  # of the capacity
CHUNKED = SchedulerSettings()
WHOLE = SchedulerSettings(max_num_batched_tokens=2**20, max_step_ms=1e9)  # a prompt is read in one step


@dataclass(slots=True)
class Request(Asked):
    """A request with its prompt's tokens."""

    ids: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, ids: list[int], answer: int, at: float = 0.0) -> Request:
        """One that is due ``at`` seconds."""
        return cls(len(ids), answer, at, ids=ids)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen2-0.5b")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of prompt and answer together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ttft", type=float, default=2.0, help="seconds")
    parser.add_argument("--itl", type=float, default=200.0, help="milliseconds")
    options = parser.parse_args()
    if said := warning(foreign_share_now(), "before the start"):
        print(said)
    set_threads(options.threads)
    watch = Watch(())
    with use(None):
        model = load_model(DummyCheckpoint(options.shape), quantize=BITS)
        results = {
            "arrivals": arrivals(model, options),
            "shared_prefix": shared_prefix(model),
            "long_prompt": long_prompt(model),
        }
    facts = {"benchmark": "serve_offline", "shape": options.shape, "threads": options.threads}
    print(json.dumps({**facts, **results, "foreign_share": watch.foreign_share()}))


def arrivals(model: Model, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All at once, then at shares of that capacity; with chunks and without."""
    trace = data_folder() / "traces" / "azure_2023_conv.csv"
    lengths = trace_lengths(trace, options.requests, options.longest)
    print(
        f"\n{options.requests} requests of {statistics.mean(p for p, _ in lengths):.0f} + "
        f"{statistics.mean(a for _, a in lengths):.0f} tokens"
    )
    columns = ("tok/s", "ttft p50", "p95", "p99 ms", "itl p50", "p95", "p99 ms", "goodput/s")
    print(f"{'':<24}" + "".join(f"{name:>10}" for name in columns))
    found: dict[str, dict[str, float]] = {}
    for name, scheduler in (("chunks", CHUNKED), ("whole prompts", WHOLE)):
        capacity = 0.0
        for share in (None, *SHARES):
            requests = asked(lengths, 0.0 if share is None else capacity * share)
            seconds = run(warm(model, scheduler), requests)
            if share is None:
                capacity = len(requests) / seconds
            label = f"{name}, " + ("all at once" if share is None else f"{share:.0%}")
            found[label] = row = figures(requests, seconds, options.ttft, options.itl / 1e3)
            print(f"{label:<24}" + "".join(f"{value:>10.2f}" for value in map(row.get, SHOWN)))
    return found


def shared_prefix(model: Model) -> dict[str, float]:
    """The median time to the first token of requests one by one that share a system prompt, in ms."""
    chance = random.Random(1)
    vocab = model.config.vocab_size
    system = [chance.randrange(vocab) for _ in range(SYSTEM)]
    found = {}
    for name, cache in (("cache on", True), ("cache off", False)):
        engine, taken = warm(model, CHUNKED, prefix_cache=cache), []
        for _ in range(6):
            request = Request.of(system + [chance.randrange(vocab) for _ in range(QUESTION)], ANSWER)
            run(engine, [request])
            taken.append(request.ttft)
        found[name] = 1e3 * statistics.median(taken[1:])  # the first one has nothing to find
    found["ratio"] = found["cache off"] / found["cache on"]
    print(
        f"\nfirst token after {SYSTEM} shared and {QUESTION} own tokens: {found['cache off']:.0f} ms, "
        f"with the prefix cache {found['cache on']:.0f} ms: {found['ratio']:.1f}x"
    )
    return found


def long_prompt(model: Model) -> dict[str, float]:
    """The gaps between others' tokens while a long prompt is read, in ms."""
    chance, vocab = random.Random(2), model.config.vocab_size
    others = [Request.of([chance.randrange(vocab) for _ in range(64)], 2000) for _ in range(OTHERS)]
    engine = warm(model, CHUNKED)
    for request in others:
        run_until_first(engine, request)
    began = time.perf_counter()
    request = Request.of([chance.randrange(vocab) for _ in range(LONG)], 1)
    request.began = began
    come = run_until_first(engine, request, began)
    gaps = sorted(later - earlier for earlier, later in zip([began, *come], come, strict=False))
    found = {
        "bound_ms": CHUNKED.max_step_ms,
        "p50_ms": 1e3 * gaps[len(gaps) // 2],
        "p95_ms": 1e3 * gaps[int(len(gaps) * 0.95)],
        "most_ms": 1e3 * gaps[-1],
        "read_tok_s": LONG / request.ttft,
    }
    print(
        f"while {LONG} tokens are read, {OTHERS} others get one each {found['p50_ms']:.0f} ms, p95 "
        f"{found['p95_ms']:.0f}, most {found['most_ms']:.0f} (bound {found['bound_ms']:.0f}); "
        f"the prompt goes at {found['read_tok_s']:.0f} tok/s"
    )
    return found


def asked(lengths: Sequence[tuple[int, int]], rate: float) -> list[Request]:
    """Requests with random prompts; ``rate`` a second come, or all at once where it is 0."""
    chance = random.Random(3)
    return [
        Request.of([chance.randrange(1000, 100000) for _ in range(prompt)], answer, at)
        for (prompt, answer), at in zip(lengths, poisson(len(lengths), rate, 4), strict=True)
    ]


def warm(model: Model, scheduler: SchedulerSettings, *, prefix_cache: bool = True) -> Engine:
    """An engine that has seen nothing but a short request."""
    engine = engine_of(model, scheduler, prefix_cache=prefix_cache)
    run(engine, [Request.of([1] * 64, 8)])
    return engine


def run(engine: Engine, requests: Sequence[Request]) -> float:
    """Serve all, each from its ``at`` on (seconds from now); returns the seconds until the last has ended."""
    began = time.perf_counter()
    waiting = list(reversed(requests))
    served: dict[int, Request] = {}
    while waiting or len(engine):
        now = time.perf_counter() - began
        while waiting and waiting[-1].at <= now:
            request = waiting.pop()
            request.began = began + request.at
            served[add(engine, request)] = request
        if not len(engine):
            time.sleep(max(0.0, waiting[-1].at - now))
            continue
        events = engine.step()
        now = time.perf_counter()
        for number, chunk in events:
            served[number].came += [now] * len(chunk.token_ids)
            served[number].ended = now
    return time.perf_counter() - began


def run_until_first(engine: Engine, request: Request, began: float = 0.0) -> list[float]:
    """Step until ``request`` has its first token; when the steps ended in which others got one."""
    number, come = add(engine, request), []
    while not request.came:
        events = engine.step()
        now = time.perf_counter()
        if any(other != number for other, _ in events):
            come.append(now)
        request.came += [now for own, chunk in events if own == number and chunk.token_ids]
    return come


def add(engine: Engine, request: Request) -> int:
    """Hand a request in; its answer has exactly the length asked for."""
    return engine.add(
        request.ids, SamplingParams(max_tokens=request.answer, ignore_eos=True, speculate=False)
    )


if __name__ == "__main__":
    main()
