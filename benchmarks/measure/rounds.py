"""A, B, A, B: what is compared takes turns, so that every side meets the same machine; then medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Key = tuple[str, ...]
PAUSE_S = 0.05  # an engine's threads may spin on for a while after its turn


@dataclass(frozen=True, slots=True)
class Trial:
    """One thing to measure: ``run`` returns seconds for ``amount`` units (tokens, bytes ...).

    ``once`` is for what takes too long to be repeated: a single turn.
    """

    key: Key
    amount: float
    run: Callable[[], float]
    once: bool = False


@dataclass(frozen=True, slots=True)
class Rate:
    """Units a second: the median of the rounds, the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, trial: Trial, seconds: Sequence[float]) -> Rate:
        """From a trial's seconds, a round each."""
        rates = [trial.amount / s for s in seconds]
        return cls(statistics.median(rates), min(rates), max(rates))


def interleave(trials: Iterable[Trial], rounds: int) -> dict[Key, Rate]:
    """Run every trial in turn, ``rounds`` times; rates by key. Warming up is the caller's."""
    trials = list(trials)
    seconds: dict[Key, list[float]] = {trial.key: [] for trial in trials}
    for number in range(rounds):
        for trial in trials:
            if number == 0 or not trial.once:
                seconds[trial.key].append(trial.run())
                time.sleep(PAUSE_S)
    return {trial.key: Rate.of(trial, seconds[trial.key]) for trial in trials}
