"""How fast do tokens come? Ours and the peers, interleaved in one run; random weights, medians.

Decoding is greedy steps of one token a sequence, after ``--context`` tokens that are in the cache already;
tok/s is the total of all ``--rows`` sequences. The machine's read bandwidth is measured in the same rounds,
since it is what bounds one sequence. Prints a table and one JSON line. A slow peer (mlx-lm on a CPU) makes a
few tokens, once.
"""

from __future__ import annotations

import itertools
import json

from measure.ceiling import Ceilings, ceilings_or_none
from measure.comparison import Answer, as_json, ask_all, show
from measure.machine import foreign_share_now, warning
from measure.sides import OURS, Sides, is_slow, numbers, parser, start
from measure.worker import Worker

SLOW_STEPS = 2


def main() -> None:
    """Measure and print."""
    options_of = parser(__doc__ or "", context=16, rounds=7)
    options_of.add_argument("--rows", type=numbers, default=(1,), help="sequences, with commas between")
    options_of.add_argument("--steps", type=int, default=16, help="tokens a sequence in a round")
    options = options_of.parse_args()
    if said := warning(foreign_share_now(), "before the start"):
        print(said)
    results = []
    with start(options) as sides, ceilings_or_none(bool(sides.ready)) as ceilings:
        for rows, context in itertools.product(options.rows, options.context):
            sides.open(rows, context + options.steps)
            answer = decode(sides, rows, context, options.steps, options.rounds, ceilings)
            show(f"{options.shape}, {rows} x decode at {context}", answer)
            share = share_of_bandwidth(sides, answer, rows)
            if share is not None:
                print(f"{'ours reads weights at':<34}{share:>10.1%} of that")
            results.append({"rows": rows, "context": context, "bandwidth_share": share, **as_json(answer)})
    facts = {"benchmark": "decode", "shape": options.shape, "threads": options.threads}
    print(json.dumps(facts | {"results": results, "missing": sides.missing}))


def decode(
    sides: Sides, rows: int, context: int, steps: int, rounds: int, ceilings: Ceilings | None
) -> Answer:
    """Ask all sides for ``steps`` tokens in each of ``rows`` sequences."""

    def steps_of(worker: Worker) -> int:
        return SLOW_STEPS if is_slow(worker.name) else steps

    return ask_all(
        sides,
        lambda worker: rows * steps_of(worker),
        lambda worker, setting: worker.decode(setting, context, steps_of(worker)),
        rounds,
        ceilings,
    )


def share_of_bandwidth(sides: Sides, answer: Answer, rows: int) -> float | None:
    """Our weights' bytes a second, over the bandwidth of the same rounds; None where either is unknown."""
    ours = next((worker for worker in sides.ready if worker.name == OURS), None)
    rate = answer.best(OURS)
    if ours is None or rate is None or answer.read_gb_s is None:
        return None
    return float(ours.about["read_bytes"]) * rate / rows / 1e9 / answer.read_gb_s


if __name__ == "__main__":
    main()
