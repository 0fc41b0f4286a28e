"""How fast is a prompt read? Ours and the peers, interleaved in one run; random weights, medians.

A prefill is one sequence of ``--context`` tokens, from nothing to the logits of its last token. Prints a
table and one JSON line. A slow peer (mlx-lm on a CPU) gets a few tokens, once; its rate hardly depends on how
many there are.
"""

from __future__ import annotations

import json

from measure.ceiling import Ceilings, ceilings_or_none
from measure.comparison import Answer, as_json, ask_all, show
from measure.machine import foreign_share_now, warning
from measure.sides import Sides, is_slow, parser, start
from measure.worker import Worker

SLOW_TOKENS = 8


def prefill(sides: Sides, tokens: int, rounds: int, ceilings: Ceilings | None) -> Answer:
    """Ask all sides for a prompt of ``tokens``."""

    def tokens_of(worker: Worker) -> int:
        return min(tokens, SLOW_TOKENS) if is_slow(worker.name) else tokens

    return ask_all(
        sides, tokens_of, lambda worker, way: worker.prefill(way, tokens_of(worker)), rounds, ceilings
    )


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", context=512, rounds=5).parse_args()
    if said := warning(foreign_share_now(), "before the start"):
        print(said)
    results = []
    with start(options) as sides, ceilings_or_none(bool(sides.ready)) as ceilings:
        sides.open(1, max(options.context))
        for tokens in options.context:
            answer = prefill(sides, tokens, options.rounds, ceilings)
            show(f"{options.shape}, prefill of {tokens}", answer)
            results.append({"context": tokens, **as_json(answer)})
    facts = {"benchmark": "prefill", "shape": options.shape, "threads": options.threads}
    print(json.dumps(facts | {"results": results, "missing": sides.missing}))


if __name__ == "__main__":
    main()
