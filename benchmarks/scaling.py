"""What does a second thread bring? Prefill and decode on 1 thread and on 2, interleaved; medians.

Prints a table and one JSON line. ``--threads`` says the higher number; slow peers are left out.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack

from measure.ceiling import ceilings_or_none
from measure.comparison import cores_given, machine_trials, shared_cores, trials
from measure.machine import foreign_share_now, warning
from measure.sides import Sides, is_slow, parser, start

from tiny_llm.planning.rounds import Trial, interleave

PROMPT = 128


def questions(sides: Sides, threads: int, context: int, steps: int) -> list[Trial]:
    """Both questions to sides that run on ``threads``."""
    sides.open(1, max(PROMPT, context + steps))
    prefills = trials(sides, lambda _: PROMPT, lambda w, way: w.prefill(way, PROMPT), "prefill", str(threads))
    decodes = trials(
        sides, lambda _: steps, lambda w, way: w.decode(way, context, steps), "decode", str(threads)
    )
    return [*prefills, *decodes]


def main() -> None:
    """Measure and print."""
    options_of = parser(__doc__ or "", context=16, rounds=5)
    options_of.add_argument("--steps", type=int, default=16, help="tokens in a round")
    options = options_of.parse_args()
    options.against = ",".join(name for name in options.against.split(",") if not is_slow(name))
    if said := warning(foreign_share_now(), "before the start"):
        print(said)
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        asked: list[Trial] = []
        for threads in (1, options.threads):
            sides = stack.enter_context(start(argparse.Namespace(**vars(options) | {"threads": threads})))
            asked += questions(sides, threads, options.context[0], options.steps)
            missing |= sides.missing
        ceilings = stack.enter_context(ceilings_or_none(bool(asked)))
        rates = interleave([*asked, *machine_trials(ceilings, options.threads)], options.rounds)
    cores = cores_given(rates)
    results = []
    print(f"{options.shape + ', tok/s':<34}{'1 thread':>10}{f'{options.threads} threads':>12}{'gain':>8}")
    for name, setting, what, threads in (trial.key for trial in asked):
        both = rates.get((name, setting, what, str(options.threads)))
        if threads == "1" and both is not None:
            one = rates[name, setting, what, threads].median
            results.append({"side": name, "setting": setting, "what": what, "1": one, "n": both.median})
            label = f"{name}, {setting}: {what}"
            print(f"{label:<34}{one:>10.2f}{both.median:>12.2f}{both.median / one:>7.2f}x")
    if said := shared_cores(cores, options.threads):
        print(said)
    facts = {"benchmark": "scaling", "shape": options.shape, "threads": [1, options.threads]}
    print(json.dumps(facts | {"results": results, "cores": cores, "missing": missing}))


if __name__ == "__main__":
    main()
