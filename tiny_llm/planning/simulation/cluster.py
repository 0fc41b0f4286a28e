"""Owns a simulation from its first request to its last: engines, who of them gets which, and the figures."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

from tiny_llm.planning.simulation.costs import StepMs
from tiny_llm.planning.simulation.engine import Going, SimulatedEngine, SimulatedStore
from tiny_llm.planning.simulation.figures import Figures, Sample, Samples, ServedWell, pool_row
from tiny_llm.planning.simulation.load import Asked
from tiny_llm.planning.simulation.policy import Policy
from tiny_llm.planning.timeline import FirstSequences, Stretch, bars_of

_REMEMBERED = 2**20  # names of texts, by a router
_UNEVEN = 8  # requests that an engine may have beyond twice the fewest, for the sake of a prefix


@dataclass(slots=True)
class Simulated:
    """Figures by name, the pool of the first engine over time, and what the first sequences did when."""

    row: Mapping[str, float]
    samples: list[Sample]
    bars: list[Stretch]


class Router:
    """Chooses an engine for each request. ``needs_load``: it looks at how many requests each has."""

    def __init__(self, policy: Policy, seed: int) -> None:
        self.needs_load = policy.routing == "prefix"
        self._routing = policy.routing
        self._chance, self._turn = random.Random(seed), -1
        self._owner: dict[int, int] = {}  # of a prompt's first names: who had it last

    def choose(self, asked: Asked, engines: list[SimulatedEngine]) -> int:
        """The number of an engine: by turns, by chance, or who has most of the prompt if not too busy."""
        if self._routing == "round-robin":
            self._turn = (self._turn + 1) % len(engines)
            return self._turn
        if self._routing == "random":
            return self._chance.randrange(len(engines))
        least = min(range(len(engines)), key=lambda one: len(engines[one]))
        chosen, path = least, list[int]()
        for name in asked.names:
            path.append(hash((path[-1] if path else 0, name)))
        for known in path:
            if known not in self._owner:
                break
            chosen = self._owner[known]
        if len(engines[chosen]) > 2 * len(engines[least]) + _UNEVEN:
            chosen = least
        if len(self._owner) > _REMEMBERED:
            self._owner.clear()
        self._owner |= dict.fromkeys(path, chosen)
        return chosen


class Cluster:
    """Engines under one policy. With some for ``prefill``, those read prompts and hand them to the others."""

    def __init__(
        self,
        policy: Policy,
        costs: StepMs,
        limits: ServedWell,
        *,
        draw: bool = False,
        strides: bool = True,
        seed: int = 0,
    ) -> None:
        self.figures = Figures(limits)
        self.samples = Samples()
        self._hand_ms = costs.kv_token_bytes / (policy.link_gb_s * 1e6)  # a token's way
        self._whole: dict[int, Asked] = {}  # of those whose prompts are read apart
        self._handed: list[tuple[float, int, Asked, float]] = []  # (when, request, what is left, first token)
        self._routers = (Router(policy, seed), Router(policy, seed + 1))

        def made(count: int, ended: Callable[[Going], None], has_all: bool) -> list[SimulatedEngine]:
            return [
                SimulatedEngine(
                    policy,
                    costs,
                    self.figures,
                    ended,
                    store=SimulatedStore(0, 0.0, everything=True) if has_all else None,
                    strides=strides,
                    seed=seed + number,
                )
                for number in range(count)
            ]

        self.readers = made(policy.prefill, self._hand_over, has_all=False)
        self.engines = made(policy.replicas, self._end, has_all=policy.prefill > 0)
        self.trace = FirstSequences() if draw else None
        self.engines[0].samples, self.engines[0].draw_owners = self.samples, draw
        for engine in self.engines:
            engine.trace = self.trace

    def run(
        self, requests: Iterable[Asked], progress: Callable[[int], None] = lambda done: None
    ) -> Simulated:
        """Serve all of them; ``progress`` is told how many have come, now and then."""
        for number, asked in enumerate(requests, 1):
            if self.readers:
                self._hand_until(asked.at)
                if asked.answer > 1:
                    self._whole[number] = asked
                self._give(0, self.readers, number, asked._replace(answer=1), asked.at)
            else:
                self._give(0, self.engines, number, asked, asked.at)
            if number % 1024 == 0:
                progress(number)
        self._hand_until(inf)
        for engine in self.engines:
            engine.run_until(inf)
        return Simulated(self._row(), self.samples.kept, bars_of(self.trace.events if self.trace else ()))

    def _give(
        self,
        side: int,
        engines: list[SimulatedEngine],
        number: int,
        asked: Asked,
        at: float,
        first: float = -1.0,
    ) -> None:
        router = self._routers[side]
        if router.needs_load:
            for engine in engines:
                engine.run_until(at)
        engine = engines[router.choose(asked, engines)]
        engine.run_until(at)
        engine.add(number, asked, at, first)

    def _hand_until(self, at: float) -> None:
        """Let those who read prompts go on, and the others have what they hand over."""
        for reader in self.readers:
            reader.run_until(at)
        while self._handed and self._handed[0][0] <= at:
            when, number, asked, first = heappop(self._handed)
            self._give(1, self.engines, number, asked, when, first)

    def _hand_over(self, one: Going) -> None:
        asked = self._whole.get(one.seq.id)
        if asked is None:
            self._end(one)
            return
        # The prompt goes with its first token; that one's own keys and values are computed there.
        left = asked._replace(prompt=asked.prompt + 1, answer=asked.answer - 1)
        when = one.first + asked.prompt * self._hand_ms / 1e3
        heappush(self._handed, (when, one.seq.id, left, one.first))

    def _end(self, one: Going) -> None:
        asked = self._whole.pop(one.seq.id, one.asked)
        self.figures.end(asked.prompt, asked.answer, asked.at, one.first, one.last)

    def _row(self) -> Mapping[str, float]:
        engines = [*self.readers, *self.engines]
        caches = [engine.scheduler.blocks.prefix for engine in engines]
        hits = sum(cache.hit_tokens for cache in caches if cache)
        asked = hits + sum(cache.miss_tokens for cache in caches if cache)
        return {
            **self.figures.row(),
            "hit_share": hits / max(1, asked),
            "preempted": sum(sum(engine.scheduler.preempted.values()) for engine in engines),
            "steps": sum(engine.steps for engine in engines),
            "busy_share": sum(engine.busy_s for engine in engines)
            / len(engines)
            / max(self.figures.last, 1e-9),
            **pool_row(self.samples.kept),
        }
