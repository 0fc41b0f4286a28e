"""How many tokens a second do many sequences get together? Ours and the peers, interleaved; medians.

Each of ``--rows`` sequences has ``--context`` tokens, and gets one in every step; ours go through the whole
engine, text included. Then what a step of ours spends outside of the model, by part: it is prepared while the
step before it runs. Prints a table, and one JSON line. A peer that is slow (mlx-lm on a CPU) is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from decode import decode
from measure.ceiling import ceilings_or_none
from measure.comparison import Answer, as_json, show
from measure.machine import foreign_share_now, warning
from measure.sides import OURS, Sides, numbers, parser, start

ROWS = (1, 2, 4, 8, 16, 32)
OUTSIDE = ("schedule_us", "build_us", "sample_us", "commit_us")


def main() -> None:
    """Measure and print."""
    options_of = parser(__doc__ or "", context=256, rounds=3)
    options_of.add_argument("--rows", type=numbers, default=ROWS, help="sequences, with commas between")
    options_of.add_argument("--steps", type=int, default=16, help="tokens a sequence in a round")
    options_of.set_defaults(against="llamacpp")
    options = options_of.parse_args()
    if said := warning(foreign_share_now(), "before the start"):
        print(said)
    results: dict[int, Answer] = {}
    parts: dict[int, Mapping[str, float]] = {}
    with start(options) as sides, ceilings_or_none(bool(sides.ready)) as ceilings:
        (context,) = options.context
        for rows in options.rows:
            sides.open(rows, context + options.steps)
            results[rows] = decode(sides, rows, context, options.steps, options.rounds, ceilings)
            show(f"{options.shape}, {rows} x decode at {context}", results[rows])
            parts[rows] = figures(sides)
        show_growth(results)
        show_parts(parts)
        facts = {"benchmark": "batch", "shape": options.shape, "threads": options.threads, "context": context}
    found = [{"rows": n, "us_a_step": parts[n], **as_json(answer)} for n, answer in results.items()]
    print(json.dumps(facts | {"results": found, "missing": sides.missing}))


def figures(sides: Sides) -> Mapping[str, float]:
    """What our engine says of its last round; empty where we are not among the sides."""
    ours = next((worker for worker in sides.ready if worker.name == OURS), None)
    return ours.figures() if ours is not None else {}


def show_growth(results: Mapping[int, Answer]) -> None:
    """Print our tokens a second over those of the fewest sequences."""
    alone = results[min(results)].best(OURS)
    if alone is None:
        return
    print(f"\n{'sequences':>10}{'tok/s':>10}{'of one':>9}")
    for rows, answer in results.items():
        rate = answer.best(OURS) or 0.0
        print(f"{rows:>10}{rate:>10.1f}{rate / alone:>8.2f}x")


def show_parts(parts: Mapping[int, Mapping[str, float]]) -> None:
    """Print what a step takes outside of the model."""
    if not all(parts.values()):
        return
    names = [name.removesuffix("_us") for name in OUTSIDE]
    print(f"\n{'us a step':>10}" + "".join(f"{name:>10}" for name in [*names, "together", "of a step"]))
    for rows, figure in parts.items():
        outside = sum(figure[name] for name in OUTSIDE)
        row = [*(figure[name] for name in OUTSIDE), outside]
        print(f"{rows:>10}" + "".join(f"{us:>10.0f}" for us in row) + f"{outside / figure['step_us']:>10.1%}")


if __name__ == "__main__":
    main()
