"""Owns the record of who was computed when, in the format that Perfetto and chrome://tracing open.

One track a sequence: waiting, chunks of its prompt, decodes, time on the host while swapped out; and
one for the steps themselves. Curves of what was guessed so far, and right, by source.
Source: the Trace Event Format ("complete" and "counter" events, microseconds).
"""

from __future__ import annotations

import json
from pathlib import Path

from tiny_llm.data import Plan
from tiny_llm.scheduler.speculation import Speculation

_STEPS = 0  # the track of the steps; sequences are numbered from 1


class Trace:
    """Collects events; ``save`` writes them. Times are seconds of the engine's clock."""

    def __init__(self) -> None:
        self._events: list[dict[str, object]] = []
        self._waits: dict[int, tuple[str, float]] = {}  # as what, and since when

    def arrived(self, seq_id: int, at: float) -> None:
        """A sequence began to wait for its first step."""
        self._waits[seq_id] = "waiting", at

    def step(self, plan: Plan, began: float, ended: float) -> None:
        """A step was run."""
        sequences, tokens = len(plan.items), sum(len(item.tokens) for item in plan.items)
        self._add("step", _STEPS, began, ended, sequences=sequences, tokens=tokens, drafted=plan.drafted)
        for number, item in enumerate(plan.items):
            wait = self._waits.pop(item.seq_id, None)
            if wait is not None:
                self._add(wait[0], item.seq_id, wait[1], began)
            name = "decode" if number < plan.decodes else "prefill"
            self._add(name, item.seq_id, began, ended, start=item.start, tokens=len(item.tokens))
        for seq_id, swapped in plan.preempted:
            self._waits[seq_id] = "swapped" if swapped else "waiting", began
        for name, moved in (("swap out", plan.swap_out), ("swap in", plan.swap_in)):
            if moved:
                self._add(name, _STEPS, began, ended, blocks=len(moved))

    def guesses(self, at: float, made: Speculation) -> None:
        """How many guesses there have been until now, and how many right ones, each by its source."""
        for name, totals in (("guesses", made.drafted), ("right guesses", made.accepted)):
            self._events.append(_event(name, "C", _STEPS, dict(totals), ts=round(at * 1e6, 1)))

    def save(self, path: Path) -> None:
        """Write the trace. Raises OSError if the file cannot be written."""
        tracks = sorted({int(str(event["tid"])) for event in self._events})
        called = {track: "steps" if track == _STEPS else f"sequence {track}" for track in tracks}
        names = [_event("thread_name", "M", track, {"name": name}) for track, name in called.items()]
        path.write_text(json.dumps({"traceEvents": names + self._events}), encoding="utf-8")

    def _add(self, name: str, track: int, began: float, ended: float, **details: int) -> None:
        times = {"ts": round(began * 1e6, 1), "dur": round((ended - began) * 1e6, 1)}
        self._events.append(_event(name, "X", track, details, **times))


def _event(name: str, kind: str, track: int, args: object, **times: float) -> dict[str, object]:
    return {"name": name, "ph": kind, "pid": 1, "tid": track, **times, "args": args}
