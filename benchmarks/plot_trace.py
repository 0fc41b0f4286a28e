"""Draw a trace of ``generate --file ... --trace trace.json`` as an SVG: who was computed when.

    python benchmarks/plot_trace.py trace.json timeline.svg

A row a sequence, time to the right; waiting, chunks of the prompt, decodes and time spent swapped out are
colours of their own. At most ``--sequences`` rows are drawn, the first to arrive.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tiny_llm.planning.timeline import MOST_ROWS, bars_of, draw


def main() -> None:
    """Read a trace, write a picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--sequences", type=int, default=MOST_ROWS, help="rows at most")
    options = parser.parse_args()
    try:
        events = json.loads(options.trace.read_text(encoding="utf-8"))["traceEvents"]
        options.picture.write_text(draw(bars_of(events), options.sequences), encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        parser.error(f"{options.trace}: {error}")
    print(f"{options.picture}: {len({event['tid'] for event in events if event.get('ph') == 'X'})} tracks")


if __name__ == "__main__":
    main()
