"""Is the simulator true? Three loads served on this machine, and simulated with costs that were fitted here.

Qwen2 0.5B's shape with random weights of 4 bits, all at once and as they come (Poisson), and the bundled
model as they come. Before each load steps are measured (``bench --fit`` does the same), then the load runs
on the real engine, then through the simulator: the same requests at the same times. Prints both and one JSON
line. Then what a pool holds without pages and with them, on lengths as ShareGPT's and Alpaca's: what Kwon et
al. 2023 (figure 2) measured as 20.4 to 38.2 % and 96.3 % of the memory for keys and values.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

from measure.engine import BITS, engine_of
from measure.machine import Watch, foreign_share_now, warning
from measure.serving import Asked, figures

from tiny_llm.data import SamplingParams
from tiny_llm.engine.engine import Engine
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.models.loading import load_model
from tiny_llm.models.registry import Model
from tiny_llm.ops.backend import set_threads, use
from tiny_llm.planning.fit import fit_steps
from tiny_llm.planning.simulation.cluster import Cluster
from tiny_llm.planning.simulation.costs import StepMs, costs_of
from tiny_llm.planning.simulation.figures import ServedWell
from tiny_llm.planning.simulation.load import Asked as Coming
from tiny_llm.planning.simulation.load import Load
from tiny_llm.planning.simulation.policy import Policy
from tiny_llm.weights.hub import resolve

AT_ONCE = 1e6  # requests a second
LOADS = ("at once", "as they come", "bundled, as they come")
SHOWN = ("tok_s", "ttft_p50_ms", "ttft_p95_ms", "itl_p50_ms", "itl_p95_ms")
WITHIN = {"tok_s": 0.10, "ttft_p50_ms": 0.20, "ttft_p95_ms": 0.20}
POOLS: Sequence[tuple[str, str, str]] = (
    ("Orca (Max), 20.4 %", "buddy", "max"),
    ("Orca (Pow2), 26.8 %", "buddy", "pow2"),
    ("Orca (Oracle), 38.2 %", "buddy", "exact"),
    ("first fit, exact", "first", "exact"),
    ("best fit, exact", "best", "exact"),
    ("vLLM, 96.3 %", "paged", "max"),
)
OPT_13B_TOKENS = 15_700  # of room on an A100 with 40 GB; Kwon et al. 2023, table 1


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen2-0.5b")
    parser.add_argument("--requests", type=int, default=24, help="of each load of that shape")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pools-only", action="store_true", help="nothing is measured")
    parser.add_argument("--load", choices=LOADS, help="this one alone, and no pools; by default all three")
    options = parser.parse_args()
    result: dict[str, object] = {"benchmark": "simulate"}
    if options.load is None:
        result["pools"] = pools()
    if not options.pools_only:
        if said := warning(foreign_share_now(), "before the start"):
            print(said)
        set_threads(options.threads)
        watch = Watch(())
        with use(None):
            result["loads"] = loads(options)
        result["foreign_share"] = watch.foreign_share()
    print(json.dumps(result))


def loads(options: argparse.Namespace) -> dict[str, object]:
    """Each load, really and simulated."""
    load = Load(requests=options.requests, rate=AT_ONCE, lengths="64:32", spread=0.6, longest=512)
    later = replace(load, rate=None)
    big = cache(lambda: load_model(DummyCheckpoint(options.shape), quantize=BITS))
    asked = {LOADS[0]: load, LOADS[1]: later, LOADS[2]: replace(later, requests=10 * load.requests)}
    found: dict[str, object] = {}
    print(f"\n{'':<44}" + "".join(f"{name:>14}" for name in SHOWN))
    for name, own in asked.items():
        if options.load in (None, name):
            found[name] = both(name, load_model(resolve("demo")) if name == LOADS[2] else big(), own)
    return found


def both(name: str, model: Model, load: Load) -> Mapping[str, object]:
    """A load on the real engine and in the simulator; without a rate, at 0.7 of what could be served."""
    costs = fit_steps(engine_of(model), model.config, name)
    if load.rate is None:
        load = replace(load, rate=0.7 * simulated(costs, replace(load, rate=AT_ONCE))["requests_s"])
    sides = {"simulated": simulated(costs, load), "real": real(model, load)}
    for side, row in sides.items():
        print(f"{name + ', ' + side:<44}" + "".join(f"{row[key]:>14.1f}" for key in SHOWN), flush=True)
    off = {key: sides["simulated"][key] / sides["real"][key] - 1 for key in SHOWN}
    print(f"{'':<44}" + "".join(f"{off[key]:>+14.1%}" for key in SHOWN))
    is_true = all(abs(off[key]) <= most for key, most in WITHIN.items())
    shown = {side: {key: round(row[key], 2) for key in SHOWN} for side, row in sides.items()}
    return {**shown, "rate": load.rate, "is_true": is_true, "off": {key: round(off[key], 3) for key in off}}


def simulated(costs: StepMs, load: Load) -> Mapping[str, float]:
    """What the simulator says."""
    return Cluster(Policy(), costs, ServedWell()).run(coming(load)).row


def coming(load: Load) -> list[Coming]:
    """Its requests, to the millisecond: at once is at one moment."""
    return [one._replace(at=round(one.at, 3)) for one in load]


def real(model: Model, load: Load) -> Mapping[str, float]:
    """What the engine does."""
    engine, chance = engine_of(model), random.Random(1)
    prompts = [[chance.randrange(model.config.vocab_size) for _ in range(one.prompt)] for one in coming(load)]
    warm(engine)
    waiting = [Asked(one.prompt, one.answer, one.at) for one in coming(load)]
    began, left, served = time.perf_counter(), list(zip(waiting, prompts, strict=True))[::-1], {}
    while left or len(engine):
        now = time.perf_counter() - began
        while left and left[-1][0].at <= now:
            asked, ids = left.pop()
            asked.began = began + asked.at
            params = SamplingParams(max_tokens=asked.answer, ignore_eos=True, speculate=False)
            served[engine.add(ids, params, arrival_s=asked.began)] = asked
        if not len(engine):
            time.sleep(max(0.0, left[-1][0].at - now))
            continue
        events = engine.step()
        now = time.perf_counter()
        for number, chunk in events:
            served[number].came += [now] * len(chunk.token_ids)
            served[number].ended = now
    return figures(waiting, time.perf_counter() - began, 2.0, 0.1)


def warm(engine: Engine) -> None:
    """A short request, and another beside it."""
    for _ in range(2):
        engine.add([1] * 64, SamplingParams(max_tokens=8, ignore_eos=True, speculate=False))
    while len(engine):
        engine.step()


def pools() -> dict[str, dict[str, float]]:
    """Percent of the pool that holds tokens while requests wait, by lengths and by how memory is given."""
    costs, found = replace(costs_of("qwen2-7b", "a100-40gb"), kv_tokens=OPT_13B_TOKENS), {}
    print(f"{'percent of the pool holds tokens':<34}" + "".join(f"{name:>26}" for name, *_ in POOLS))
    for lengths, rate, count in (("sharegpt", 4.0, 1000), ("alpaca", 300.0, 6000)):
        load = Load(lengths=lengths, rate=rate, requests=count)
        row = {}
        for name, memory, reserve in POOLS:
            policy = Policy(memory=memory, reserve=reserve, max_concurrent=1024)  # type: ignore[arg-type]
            row[name] = round(100 * Cluster(policy, costs, ServedWell()).run(load).row["held_share"], 1)
        print(f"{lengths:<34}" + "".join(f"{share:>26}" for share in row.values()), flush=True)
        found[lengths] = row
    return found


if __name__ == "__main__":
    main()
