"""What users of a server feel: requests with lengths, when their tokens came, and figures of that.

Knows neither HTTP nor an engine: `benchmarks/serve.py` and `serve_offline.py` share it.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class Asked:
    """A request: how long, when it is due (seconds from the start), and when its tokens came.

    ``began`` and ``came`` are seconds of one clock; ``came`` has a time for each piece of text.
    ``tokens`` is how many there were, if that is not the number of pieces. ``engine_ttft_s``: the first token
    after the engine took it, if the server tells. ``error``: it failed.
    """

    prompt: int
    answer: int
    at: float = 0.0
    began: float = 0.0
    came: list[float] = field(default_factory=list)
    ended: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    engine_ttft_s: float = 0.0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds until the first token."""
        return self.came[0] - self.began

    @property
    def gaps(self) -> list[float]:
        """Seconds between its tokens."""
        return [later - earlier for earlier, later in zip(self.came, self.came[1:], strict=False)]


def quantile(values: Iterable[float], share: float) -> float:
    """The value that ``share`` of them do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def figures(requests: Sequence[Asked], seconds: float, ttft: float, itl: float) -> dict[str, float]:
    """What users felt. Times in ms; good is whoever had the first token within ``ttft`` seconds, and 95 %
    of the others within ``itl`` seconds of the one before."""
    served = [request for request in requests if not request.error and request.came]
    gaps = [gap for request in served for gap in request.gaps]
    good = [r for r in served if r.ttft <= ttft and (not r.gaps or quantile(r.gaps, 0.95) <= itl)]
    times = {
        "ttft": [request.ttft for request in served],
        "itl": gaps,
        "e2e": [request.ended - request.began for request in served],
    }
    quantiles = {
        f"{name}_p{round(100 * share)}_ms": 1e3 * quantile(values, share)
        for name, values in times.items()
        for share in (0.5, 0.95, 0.99)
    }
    return {
        "tok_s": sum(request.tokens or len(request.came) for request in served) / seconds,
        **quantiles,
        "goodput_s": len(good) / seconds,
        "failed": float(len(requests) - len(served)),
    }


def trace_lengths(path: Path, count: int, longest: int) -> list[tuple[int, int]]:
    """Prompt and answer lengths of ``count`` conversations of the Azure 2023 trace (Patel et al. 2024),
    the longest of them scaled to ``longest`` tokens."""
    with path.open(encoding="utf-8") as file:
        rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    chosen = random.Random(0).sample([row for row in rows if min(row) > 0], count)
    scale = longest / max(map(sum, chosen))
    return [(max(1, int(prompt * scale)), max(1, int(answer * scale))) for prompt, answer in chosen]


def mixed_lengths(count: int, prompt: int, answer: int) -> list[tuple[int, int]]:
    """Lengths around the two given: from half of them to one and a half, the same every time."""
    chance = random.Random(0)
    return [
        (max(1, int(prompt * (0.5 + chance.random()))), max(2, int(answer * (0.5 + chance.random()))))
        for _ in range(count)
    ]


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """When each of ``count`` requests is due, at ``rate`` a second; all at once where it is 0."""
    chance, at, due = random.Random(seed), 0.0, []
    for _ in range(count):
        due.append(at)
        at += chance.expovariate(rate) if rate else 0.0
    return due
