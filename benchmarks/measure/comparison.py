"""One question to all sides: trials from it, rounds of them, a table, and the ratios for the JSON line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from measure.ceiling import Ceilings
from measure.machine import Watch, warning
from measure.sides import OURS, Sides, is_slow
from measure.worker import Worker, WorkerError
from tiny_llm.planning.rounds import Key, Rate, Trial, interleave

READ, CORES = ("memory read",), ("cores",)
LEAST_CORES = 0.9  # of a thread: below, a host shares what it gave us
Ask = Callable[[Worker, str], float]
Amounts = Callable[[Worker], int]


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens a second of every side's every setting, and what the machine gave in the same rounds.

    ``cores`` is how much faster multiply-adds are on all threads than on one; None without a compiler.
    """

    rates: Mapping[Key, Rate]
    threads: int
    read_gb_s: float | None
    cores: float | None
    foreign_share: float | None

    def best(self, side: str) -> float | None:
        """The median of a side's better setting; None where it is missing."""
        return max((rate.median for (name, _), rate in self.rates.items() if name == side), default=None)

    @property
    def ratios(self) -> dict[str, float]:
        """Ours over each peer's setting, and over its better one by the peer's name alone."""
        ours = self.best(OURS)
        peers = dict.fromkeys(name for name, _ in self.rates if name != OURS)
        if ours is None:
            return {}
        found = {name: ours / best for name in peers if (best := self.best(name))}
        found |= {f"{name}, {s}": ours / r.median for (name, s), r in self.rates.items() if name != OURS}
        return {name: round(ratio, 3) for name, ratio in found.items()}


def trials(sides: Sides, amounts: Amounts, ask: Ask, *more: str) -> list[Trial]:
    """A trial for every setting of every side, under (side, setting, *more).

    Each is asked once here, to warm up, so that a side that fails is lost before the rounds.
    """
    for worker in list(sides.ready):
        try:
            for setting in () if is_slow(worker.name) else worker.settings:
                ask(worker, setting)
        except WorkerError as error:
            sides.lose(worker.name, error)
    return [
        Trial((w.name, setting, *more), amounts(w), partial(ask, w, setting), is_slow(w.name))
        for w in sides.ready
        for setting in w.settings
    ]


def machine_trials(ceilings: Ceilings | None, threads: int) -> list[Trial]:
    """What the machine gives while others are measured: memory read in GB/s, and how many cores."""
    if ceilings is None:
        return []
    return [
        Trial(READ, 1.0, lambda: 1e9 / ceilings.rate("read", threads)),
        Trial(CORES, 1.0, lambda: ceilings.rate("fma", 1) / ceilings.rate("fma", threads)),
    ]


def ask_all(sides: Sides, amounts: Amounts, ask: Ask, rounds: int, ceilings: Ceilings | None) -> Answer:
    """Ask every side in turn. ``ask`` returns the seconds for a worker's ``amounts`` of tokens."""
    asked = trials(sides, amounts, ask)
    watch = Watch(sides.pids + ([ceilings.pid] if ceilings else []))
    rates = interleave([*asked, *machine_trials(ceilings, sides.threads)], rounds)
    cores, read = cores_given(rates), rates[READ].median if READ in rates else None
    tokens = {trial.key: rates[trial.key] for trial in asked}
    return Answer(tokens, sides.threads, read, cores, watch.foreign_share())


def cores_given(rates: Mapping[Key, Rate]) -> float | None:
    """The median of the rounds that ``machine_trials`` had part in; None where it had none."""
    return rates[CORES].median if CORES in rates else None


def shared_cores(cores: float | None, threads: int) -> str:
    """A line to print where the machine had less than a core for each thread; empty where it had."""
    if cores is None or cores >= LEAST_CORES * threads:
        return ""
    return f"warning: {threads} threads were given {cores:.1f} cores; figures may be off"


def show(title: str, answer: Answer) -> None:
    """Print one question's table."""
    print(f"\n{title:<34}{'tok/s':>10}{'least':>10}{'most':>10}{'ours is':>10}")
    ours = answer.best(OURS)
    for (name, setting), rate in answer.rates.items():
        ratio = "" if name == OURS or ours is None else f"{ours / rate.median:.2f}x"
        label = f"{name}, {setting}"
        print(f"{label:<34}{rate.median:>10.2f}{rate.least:>10.2f}{rate.most:>10.2f}{ratio:>10}")
    if answer.read_gb_s is not None:
        print(f"{'memory read, GB/s':<34}{answer.read_gb_s:>10.1f}")
    for said in (warning(answer.foreign_share, "meanwhile"), shared_cores(answer.cores, answer.threads)):
        if said:
            print(said)


def as_json(answer: Answer) -> dict[str, object]:
    """One question's part of the JSON line."""
    rates = {f"{name}, {setting}": round(rate.median, 3) for (name, setting), rate in answer.rates.items()}
    return {
        "tok_s": rates,
        "ours_over": answer.ratios,
        "read_gb_s": answer.read_gb_s,
        "cores": answer.cores,
        "foreign_share": answer.foreign_share,
    }
