"""How much slower does decoding get when one core is taken? Ours and the peers, interleaved; medians.

Another process spins, and is stopped and continued, so that quiet and busy rounds take turns. With two cores
and two threads nobody can keep more than three quarters of the speed, where the speed is bound by the cores.
Prints a table and one JSON line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from measure.ceiling import ceilings_or_none
from measure.comparison import Ask, cores_given, machine_trials, shared_cores, trials
from measure.machine import foreign_share_now, warning
from measure.sides import is_slow, parser, start
from measure.worker import Worker

from tiny_llm.planning.rounds import interleave

SLOW_STEPS = 2


@contextmanager
def spinner() -> Iterator[int]:
    """A process that takes one core whenever it is not stopped; yields its id, stopped."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def beside(pid: int, ask: Ask) -> Ask:
    """``ask`` while the process spins."""

    def asked(worker: Worker, setting: str) -> float:
        os.kill(pid, signal.SIGCONT)
        try:
            return ask(worker, setting)
        finally:
            os.kill(pid, signal.SIGSTOP)

    return asked


def main() -> None:
    """Measure and print."""
    options_of = parser(__doc__ or "", context=16, rounds=9)
    options_of.add_argument("--steps", type=int, default=16, help="tokens in a round")
    options = options_of.parse_args()
    context = options.context[0]
    if said := warning(foreign_share_now(), "before the start"):
        print(said)

    def steps_of(worker: Worker) -> int:
        return SLOW_STEPS if is_slow(worker.name) else options.steps

    def ask(worker: Worker, setting: str) -> float:
        return worker.decode(setting, context, steps_of(worker))

    with start(options) as sides, spinner() as pid, ceilings_or_none(bool(sides.ready)) as ceilings:
        sides.open(1, context + options.steps)
        quiet = trials(sides, steps_of, ask, "quiet")
        busy = trials(sides, steps_of, beside(pid, ask), "busy")
        rates = interleave([*quiet, *busy, *machine_trials(ceilings, options.threads)], options.rounds)
    cores = cores_given(rates)
    results = []
    print(f"{f'{options.shape}, decode at {context}':<34}{'quiet':>10}{'one busy':>10}{'slowdown':>10}")
    for key in [trial.key for trial in quiet]:
        name, setting, _ = key
        free, taken = rates[key].median, rates[name, setting, "busy"].median
        results.append({"side": name, "setting": setting, "quiet_tok_s": free, "busy_tok_s": taken})
        print(f"{f'{name}, {setting}':<34}{free:>10.2f}{taken:>10.2f}{free / taken:>9.2f}x")
    if said := shared_cores(cores, options.threads):
        print(said)
    facts = {"benchmark": "busy", "shape": options.shape, "threads": options.threads, "context": context}
    print(json.dumps(facts | {"results": results, "cores": cores, "missing": sides.missing}))


if __name__ == "__main__":
    main()
