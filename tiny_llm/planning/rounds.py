"""Owns honest timing: what is compared takes turns, so that every side meets the same machine; then medians.

Knows nothing of what it times. Seconds are of ``time.perf_counter``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

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


def seconds_of(make: Callable[[], object]) -> float:
    """Seconds that one call of ``make`` takes, with all arrays in what it returns computed."""
    began = time.perf_counter()
    mx.eval(make())
    return time.perf_counter() - began


def interleave(
    trials: Iterable[Trial], rounds: int, *, warm_up: int = 0, pause: float = PAUSE_S
) -> dict[Key, Rate]:
    """Run every trial in turn, ``rounds`` times; rates by key.

    ``warm_up`` rounds go before and are not counted; a trial that runs ``once`` sits them out.
    After each turn is a ``pause`` in seconds.
    """
    trials = list(trials)
    seconds: dict[Key, list[float]] = {trial.key: [] for trial in trials}
    for number in range(-warm_up, rounds):
        for trial in trials:
            if trial.once and number != 0:
                continue
            spent = trial.run()
            if number >= 0:
                seconds[trial.key].append(spent)
            time.sleep(pause)
    return {trial.key: Rate.of(trial, seconds[trial.key]) for trial in trials}
