"""What can this machine do at most? Memory read, float32 multiply-adds, int8 dot products; medians.

Prints a table and one JSON line; says so where there is no compiler to measure with.
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing

from measure.ceiling import KINDS, Ceilings, CeilingsMissing
from measure.machine import Watch, warning
from measure.sides import numbers

from tiny_llm.planning.rounds import Rate, Trial, interleave

UNITS = {"read": "memory read, GB/s", "fma": "float32 multiply-add, GFLOP/s", "int8": "int8 dot, GOP/s"}
GIGA = 1e9


def trial(ceilings: Ceilings, kind: str, threads: int) -> Trial:
    """A trial in billions of units; a missing instruction has a rate of next to nothing."""
    return Trial((kind, str(threads)), 1.0, lambda: GIGA / max(ceilings.rate(kind, threads), 1.0))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=numbers, default=(1, 2), help="with commas between")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    try:
        with closing(Ceilings()) as ceilings:
            watch = Watch([ceilings.pid])
            trials = [trial(ceilings, kind, n) for kind in KINDS for n in options.threads]
            rates = interleave(trials, options.rounds)
            share = watch.foreign_share()
    except CeilingsMissing as missing:
        print(missing)
        print(json.dumps({"benchmark": "ceilings", "missing": str(missing)}))
        return
    print(f"{'':<32}" + "".join(f"{f'{n} threads':>14}" for n in options.threads))
    for kind in KINDS:
        row = [rates[kind, str(n)] for n in options.threads]
        print(f"{UNITS[kind]:<32}" + "".join(f"{_shown(rate):>14}" for rate in row))
    if said := warning(share, "meanwhile"):
        print(said)
    medians = {" ".join(key): round(rate.median, 2) for key, rate in rates.items()}
    print(json.dumps({"benchmark": "ceilings", "giga_per_s": medians, "foreign_share": share}))


def _shown(rate: Rate) -> str:
    return f"{rate.median:.1f}" if rate.median > 1e-6 else "no instruction"


if __name__ == "__main__":
    main()
