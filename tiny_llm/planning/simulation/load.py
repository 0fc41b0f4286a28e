"""Owns what is asked of a simulated server: a trace that others published, or a load that is made up.

Requests are made one at a time, so a million of them take no memory. Knows no scheduler.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from math import exp
from pathlib import Path
from typing import Annotated, NamedTuple

from tiny_llm.errors import RequestError, did_you_mean
from tiny_llm.limits import check_number, check_whole
from tiny_llm.options import option

MEANS: Mapping[str, tuple[float, float]] = {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}
"""Mean tokens of prompt and answer. Source: Kwon et al. 2023, PagedAttention, figure 11."""
_HASHED = 512  # tokens of a hash in Mooncake's traces


class Asked(NamedTuple):
    """A request: when it comes (seconds), its lengths in tokens, and what its prompt begins with.

    Each of ``names`` stands for ``unit`` tokens: prompts with equal first names begin alike.
    """

    at: float
    prompt: int
    answer: int
    names: tuple[int, ...] = ()
    unit: int = 0
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What comes, and when.

    ``source`` is "poisson", "bursts" (eight at once) or a file, which goes round as often as ``requests``
    wants. ``rate`` a second; None: as the file says, or 1. Lengths of a made-up load have a log-normal
    distribution, of sigma ``spread``; its prompts begin with one of ``groups`` texts of ``shared`` tokens.
    A share ``urgent`` of all has priority 1. Raises RequestError or ConfigError for what cannot be.
    """

    source: Annotated[
        str, option("Load", "poisson, bursts, or a trace: Azure's .csv, Mooncake's .jsonl.", "--load")
    ] = "poisson"
    requests: Annotated[int, option("Load", "How many; a trace goes round.")] = 1000
    rate: Annotated[
        float | None, option("Load", "Requests a second; by default as the trace says, or 1.")
    ] = None
    lengths: Annotated[
        str, option("Load", "sharegpt, alpaca, or mean tokens PROMPT:ANSWER, of a made-up load.")
    ] = "sharegpt"
    spread: Annotated[float, option("Load", "Sigma of their log-normal distribution; 0: all alike.")] = 1.0
    longest: Annotated[int, option("Load", "Tokens of prompt and answer, at most, of a made-up load.")] = 2048
    shared: Annotated[int, option("Load", "Tokens that prompts of a made-up load begin with.")] = 0
    groups: Annotated[int, option("Load", "How many such beginnings there are.")] = 8
    urgent: Annotated[float, option("Load", "Share of requests with priority 1.")] = 0.0
    seed: Annotated[int, option("Load", "The same seed, the same requests.")] = 0

    def __post_init__(self) -> None:
        check_whole("requests", self.requests)
        check_whole("longest", self.longest, least=2)
        check_whole("shared", self.shared, least=0, most=self.longest - 2)
        check_whole("groups", self.groups)
        check_number("spread", self.spread, zero=True)
        check_number("urgent", self.urgent, zero=True, most=1.0)
        if self.rate is not None:
            check_number("rate", self.rate)
        self.means()
        if not self.is_made_up and not Path(self.source).is_file():
            raise RequestError(
                f"--load is {self.source!r}, but must be poisson, bursts or a trace's file: Azure's .csv or "
                f"Mooncake's .jsonl.{did_you_mean(self.source, ('poisson', 'bursts'))}"
            )

    @property
    def is_made_up(self) -> bool:
        """Whether no file says what comes."""
        return self.source in ("poisson", "bursts")

    def means(self) -> tuple[float, float]:
        """Mean tokens of prompt and answer of a made-up load."""
        if self.lengths in MEANS:
            return MEANS[self.lengths]
        try:
            prompt, answer = map(float, self.lengths.split(":"))
            check_number("prompt", prompt)
            check_number("answer", answer)
        except ValueError:
            raise RequestError(
                f"--lengths is {self.lengths!r}, but must be sharegpt, alpaca or means such as 512:128."
            ) from None
        return prompt, answer

    def __iter__(self) -> Iterator[Asked]:
        """The requests, in order of time; the same each time."""
        chance, due = random.Random(self.seed), 0.0
        made = self._made_up(chance) if self.is_made_up else self._round_and_round()
        rate = self.rate or (1.0 if self.is_made_up else None)
        burst = 8 if self.source == "bursts" else 1
        for number in range(self.requests):
            one = next(made)
            if rate is not None and number % burst == 0:
                due += chance.expovariate(rate / burst)
            at = one.at if rate is None else due
            yield one._replace(at=at, priority=int(chance.random() < self.urgent) if self.urgent else 0)

    def _made_up(self, chance: random.Random) -> Iterator[Asked]:
        mean_prompt, mean_answer = self.means()
        down = exp(-self.spread * self.spread / 2)  # a log-normal's mean lies that much above its median

        def draw(mean: float) -> int:
            return max(1, round(mean * down * chance.lognormvariate(0.0, self.spread)))

        while True:
            prompt = min(draw(mean_prompt) + self.shared, self.longest - 1)
            answer = min(draw(mean_answer), self.longest - prompt)
            names = (chance.randrange(self.groups),) if self.shared else ()
            yield Asked(0.0, prompt, answer, names, self.shared)

    def _round_and_round(self) -> Iterator[Asked]:
        path, began, again = Path(self.source), 0.0, 0
        read = _azure if path.suffix == ".csv" else _mooncake
        while True:
            last, most = began, 0
            for one in read(path):
                last, most = began + one.at, max(most, *one.names, 0)
                yield one._replace(at=last, names=tuple(name + again for name in one.names))
            if last == began and not most:
                raise RequestError(f"{path} has no requests.")
            began, again = last, again + most + 1


def _azure(path: Path) -> Iterator[Asked]:
    """Source: Patel et al. 2024, Splitwise; TIMESTAMP, ContextTokens, GeneratedTokens."""
    with path.open(encoding="utf-8") as file:
        first = None
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                at = datetime.fromisoformat(row["TIMESTAMP"][:26])
                prompt, answer = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (KeyError, ValueError, TypeError) as error:
                raise RequestError(f"{path}, line {number}: {error}; expected Azure's columns.") from None
            first = first or at
            yield Asked((at - first).total_seconds(), max(1, prompt), max(1, answer))


def _mooncake(path: Path) -> Iterator[Asked]:
    """Source: Qin et al. 2025, Mooncake; a line of JSON each, with a hash for each 512 tokens."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                at, names = float(row["timestamp"]) / 1e3, tuple(map(int, row.get("hash_ids", ())))
                prompt, answer = int(row["input_length"]), int(row["output_length"])
            except (KeyError, ValueError, TypeError) as error:
                raise RequestError(f"{path}, line {number}: {error}; expected Mooncake's fields.") from None
            yield Asked(at, max(1, prompt), max(1, answer), names, _HASHED)
