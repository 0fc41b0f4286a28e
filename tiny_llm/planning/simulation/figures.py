"""Owns what is kept of a simulation: percentiles in bounded memory, and the pool at moments in time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, exp, log
from typing import Annotated, NamedTuple

from tiny_llm.options import option

_STEP = log(1.01)  # a bucket's ends are a hundredth apart
_LEAST = 1e-9
_SAMPLES = 512  # of the pool, at most
_APART_S = 0.05  # at first


class Sketch:
    """Numbers by magnitude: quantiles to half a hundredth, in some 3,000 counters however many there are.

    Source of the idea: Masson et al. 2019, DDSketch.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self._buckets: Counter[int] = Counter()

    def add(self, value: float, times: int = 1) -> None:
        """See ``value`` so many times."""
        self.count += times
        self.total += value * times
        self._buckets[ceil(log(max(value, _LEAST)) / _STEP)] += times

    def quantile(self, share: float) -> float:
        """What ``share`` of the numbers do not exceed; 0 of none."""
        left = share * self.count
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                return exp((bucket - 0.5) * _STEP)
        return 0.0


class Sample(NamedTuple):
    """The pool in token slots at a moment: those that hold a token, are kept for one that will come, will
    hold none, hold what is cached, are free. ``owners`` has whose each block is, where it is to be drawn."""

    at: float
    held: int
    to_come: int
    wasted: int
    cached: int
    free: int
    running: int
    waiting: int
    owners: Sequence[int] = ()


class Samples:
    """Moments, evenly apart; where there would be too many, every second one goes."""

    def __init__(self) -> None:
        self.kept: list[Sample] = []
        self.due = 0.0
        self._apart = _APART_S

    def add(self, sample: Sample) -> None:
        """Keep a moment; the next one is ``due`` later."""
        self.kept.append(sample)
        if len(self.kept) == _SAMPLES:
            del self.kept[1::2]
            self._apart *= 2
        self.due = sample.at + self._apart


@dataclass(frozen=True, slots=True)
class ServedWell:
    """Who is served well: the first token within ``ttft_s``, the others ``itl_ms`` apart on average."""

    ttft_s: Annotated[float, option("Limits", "Seconds to the first token of who is served well.")] = 2.0
    itl_ms: Annotated[float, option("Limits", "Milliseconds between the others, on average.")] = 100.0


class Figures:
    """What users felt. Times in seconds."""

    def __init__(self, limits: ServedWell) -> None:
        self.ttft, self.itl, self.e2e = Sketch(), Sketch(), Sketch()
        self.ended = self.good = self.tokens = self.prompt_tokens = self.refused = 0
        self.last = 0.0
        self._limits = limits

    def end(self, prompt: int, answer: int, came: float, first: float, last: float) -> None:
        """A request has its whole answer."""
        self.ended += 1
        self.tokens += answer
        self.prompt_tokens += prompt
        self.last = max(self.last, last)
        self.ttft.add(first - came)
        self.e2e.add(last - came)
        slow = answer > 1 and (last - first) / (answer - 1) > self._limits.itl_ms / 1e3
        self.good += first - came <= self._limits.ttft_s and not slow

    def row(self) -> Mapping[str, float]:
        """All of it, as numbers with names."""
        seconds = max(self.last, _LEAST)
        times = {"ttft": self.ttft, "itl": self.itl, "e2e": self.e2e}
        return {
            "requests": self.ended,
            "refused": self.refused,
            "seconds": seconds,
            "tok_s": self.tokens / seconds,
            "requests_s": self.ended / seconds,
            **{
                f"{name}_p{round(100 * share)}_ms": 1e3 * sketch.quantile(share)
                for name, sketch in times.items()
                for share in (0.5, 0.95, 0.99)
            },
            "goodput_s": self.good / seconds,
            "good_share": self.good / max(1, self.ended),
        }


def pool_row(samples: Sequence[Sample]) -> Mapping[str, float]:
    """Shares of the pool on average, over the moments at which somebody waited (or all, if nobody did)."""
    busy = [one for one in samples if one.waiting] or list(samples)
    names = ("held", "to_come", "wasted", "cached", "free")
    sums = {name: sum(getattr(one, name) for one in busy) for name in names}
    total = max(1, sum(sums.values()))
    used = max(1, sums["held"] + sums["to_come"] + sums["wasted"])
    return {f"{name}_share": sums[name] / total for name in names} | {"held_of_used": sums["held"] / used}
