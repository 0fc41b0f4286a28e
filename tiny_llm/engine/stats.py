"""Owns the engine's figures: what was done, how long each part took, what users felt. Chapter 3.6."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial

from tiny_llm.data import Plan
from tiny_llm.decoding.answer import Answer
from tiny_llm.kv.blocks import Usage
from tiny_llm.kv.disk import DiskUsage

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PARTS = ("schedule", "draft", "build", "forward", "sample", "commit")
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Histogram:
    """Counts of values by upper bound, as Prometheus has them; the last count has no bound."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def mean(self) -> float:
        """The mean of all values, 0 of none."""
        number = sum(self.counts)
        return self.total / number if number else 0.0

    def quantile(self, share: float) -> float:
        """What ``share`` of the values are below, about: by line within a bound and the next. 0 of none."""
        wanted, low = share * sum(self.counts), 0.0
        for bound, count in zip((*self.bounds, self.bounds[-1]), self.counts, strict=True):
            if count and wanted <= count:
                return low + (bound - low) * wanted / count
            wanted, low = wanted - count, bound
        return 0.0

    def summary(self) -> dict[str, float]:
        """Count, mean, median, 95th and 99th percentile."""
        quantiles = {f"p{round(100 * share)}": self.quantile(share) for share in (0.5, 0.95, 0.99)}
        return {"count": sum(self.counts), "mean": self.mean(), **quantiles}


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine began. ``parts`` are seconds of steps by part.

    ``decodes`` are steps that a sequence decoded in: each gave it a token, and what was guessed right.
    """

    steps: int = 0
    decodes: int = 0
    failed_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    queue_s: Histogram = field(default_factory=partial(Histogram, SECONDS))
    ttft_s: Histogram = field(default_factory=partial(Histogram, SECONDS))
    inter_token_s: Histogram = field(default_factory=partial(Histogram, SECONDS))
    step_s: Histogram = field(default_factory=partial(Histogram, SECONDS))
    step_tokens: Histogram = field(default_factory=partial(Histogram, SIZES))
    step_sequences: Histogram = field(default_factory=partial(Histogram, SIZES))

    def count_token(self, answer: Answer, arrival: float, now: float) -> None:
        """An answer gets a token: its first, since its request's ``arrival``, or one after another."""
        self.generation_tokens += 1
        if answer.checker.num_tokens:
            self.inter_token_s.add(now - answer.last_s)
        else:
            self.ttft_s.add(now - arrival)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An engine's figures at one moment. ``totals`` are since it began, and are the engine's own: they go on.

    ``running`` and ``waiting`` count sequences, ``preempted`` how often one gave way, by how;
    ``drafted_tokens`` were guessed and checked, ``accepted_tokens`` of them right, by source; ``fallbacks``
    are calls of an op that had no kernel, ``kernel_s`` is what kernels took where they are timed.
    ``ops_on_ours`` run on kernels of ours, and ``same_tokens`` is whether an answer's tokens are the same
    whatever else is running. Times in seconds; ``memory_bytes`` is all that the process holds, ``disk`` what
    lies there, if blocks are kept.
    """

    healthy: bool
    running: int
    waiting: int
    blocks: Usage
    block_bytes: int
    prefix_hit_tokens: int
    prefix_miss_tokens: int
    preempted: Mapping[str, int]
    drafted_tokens: Mapping[str, int]
    accepted_tokens: Mapping[str, int]
    totals: EngineStats
    fallbacks: Mapping[str, int]
    kernel_s: float | None
    ops_on_ours: tuple[str, ...]
    same_tokens: bool
    memory_bytes: int
    disk: DiskUsage | None

    def as_json(self) -> dict[str, object]:
        """All of it as JSON holds it, the totals beside the rest, a histogram by its summary."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "totals"}
        own["blocks"] = self.blocks._asdict()
        own["disk"] = None if self.disk is None else self.disk._asdict()
        totals = {one.name: getattr(self.totals, one.name) for one in fields(self.totals)}
        told = {n: one.summary() if isinstance(one, Histogram) else one for n, one in totals.items()}
        return own | told


class StepClock:
    """Times one step's parts: ``lap`` after each of them. Counts the step when it is ``done``."""

    def __init__(self, stats: EngineStats, clock: Callable[[], float]) -> None:
        self._stats = stats
        self._clock = clock
        self._began = self._last = clock()

    def lap(self, part: str) -> None:
        """What was done since the last lap was ``part``."""
        now = self._clock()
        self._stats.parts[part] += now - self._last
        self._last = now

    def done(self, plan: Plan) -> float:
        """Count the step; return its milliseconds."""
        stats, seconds = self._stats, self._last - self._began
        stats.steps += 1
        stats.decodes += plan.decodes
        stats.step_s.add(seconds)
        stats.step_tokens.add(plan.decodes + plan.drafted + plan.chunk_tokens)
        stats.step_sequences.add(len(plan.items))
        stats.prompt_tokens += plan.chunk_tokens
        return seconds * 1e3
