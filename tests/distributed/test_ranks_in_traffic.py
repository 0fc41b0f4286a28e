"""Same tokens on one rank and on several, in traffic: chunks, hits, forks, guesses, swaps, steps ahead.

The other ranks are threads of this process, which is all that tells them from those that users start.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_same_tokens import SETTINGS, Ask, alone, together, traffic
from tiny_llm import LLM, BeamParams, CapacityError, ConfigError, SamplingParams
from tiny_llm.distributed.meeting import Ranks, Start
from tiny_llm.engine import ranks as ranks_module
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.errors import GroupError

pytestmark = pytest.mark.slow


class RankThread:
    """A follower in a thread, as rank 0 sees a process."""

    returncode = 2

    def __init__(self, leader: str, secret: str, options: Mapping[str, Any]) -> None:
        own = Ranks(leader=leader, secret=secret)
        self.error: BaseException | None = None

        def run() -> None:
            try:
                LLM(**options, ranks=own)
            except BaseException as error:  # SystemExit, where all is well
                self.error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def poll(self) -> int | None:
        return None if self._thread.is_alive() else self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        return self.returncode

    def kill(self) -> None:
        """A thread leaves by itself."""


def with_ranks(monkeypatch: pytest.MonkeyPatch, size: int, options: Mapping[str, Any], **more: Any) -> LLM:
    """An LLM of so many ranks, of which the others are threads; ``more`` are options of rank 0's alone."""
    started: list[RankThread] = []

    def starting(name: str, how: object, timeout_s: float) -> Start:
        def start(leader: str, secret: str) -> Any:
            started.append(RankThread(leader, secret, options))
            return started[-1]

        return start

    monkeypatch.setattr(ranks_module, "_starting", starting)
    return LLM(**{"threads": 1, **options, **more}, ranks=size)


class Watched:
    """An LLM whose engine is looked at when it has done its work."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def with_engine(self, settings: EngineSettings) -> LLM:
        self.used = self._llm.with_engine(settings)
        return self.used

    @property
    def preempted(self) -> Mapping[str, int]:
        return self.used.engine.scheduler.preempted


def at_once(asks: list[Ask], most: int) -> list[Ask]:
    """All in the first step, so that they want the pool together, with answers of at most so many tokens."""
    return [
        (prompt, replace(params, max_tokens=min(params.max_tokens, most)), priority, 0)
        for prompt, params, priority, _ in asks
    ]


TRIED = {
    (2, "cpu", 4): ["a draft model, swap", "small chunks"],
    (2, "cpu", None): ["recompute"],
    (2, "ref", 4): ["roomy"],
    (2, "ref", None): ["a draft model, small chunks"],
    (4, "cpu", 4): ["swap"],
}


@pytest.fixture
def ranked(
    demo: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[LLM, LLM]]:
    """The bundled model on one rank, and on so many."""
    size, backend, quantize = request.param
    dtype = None if quantize else "float32"
    options = {"model": str(demo), "backend": backend, "quantize": quantize, "dtype": dtype}
    with (
        LLM(**options, draft="demo-draft") as one,
        with_ranks(monkeypatch, size, options, draft="demo-draft") as several,
    ):
        yield one, several


@pytest.mark.parametrize("ranked, names", TRIED.items(), indirect=["ranked"], ids=str)
def test_ranks_change_no_token(ranked: tuple[LLM, LLM], names: list[str]) -> None:
    one, several = ranked
    few = several.backend == "ref"  # which is slow
    asks = at_once(traffic(one, seed=17, count=4 if few else 12, searches=0.25), 10 if few else 48)
    assert any(isinstance(params, BeamParams) for _, params, _, _ in asks) or few
    expected = alone(one, asks)
    for name in names:
        watched = Watched(several)
        assert together(watched, SETTINGS[name], asks) == expected, name  # type: ignore[arg-type]
        if SETTINGS[name].kv_blocks < 100:
            assert sum(watched.preempted.values()), "the pool is too large to show anything"


def test_steps_run_ahead_and_prompts_are_found_again(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the traffic has now and then: tokens that are drawn while the next step is told, and hits."""
    options = {"model": str(demo), "dtype": "float32"}
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=5, ignore_eos=True, speculate=False)
    with LLM(**options) as one, with_ranks(monkeypatch, 2, options) as several:
        told: list[int] = []
        real = ranks_module.DoStep.of

        def noted(engine: int, plan: Any, drawn: int = 0) -> Any:
            told.append(drawn)
            return real(engine, plan, drawn)

        monkeypatch.setattr(ranks_module.DoStep, "of", noted)
        prompt = list(range(40, 90))
        for _ in range(2):
            (expected,), (got,) = one.generate(prompt, params), several.generate(prompt, params)
            assert got.token_ids == expected.token_ids
        assert got.cached_tokens > 0
        assert sum(told) > 30, "hardly a step was told before the tokens of the last one were known"
        text = "A fox met a wolf in the wood. " * 20  # a prompt in chunks, of which nothing is drawn
        small = EngineSettings(kv_blocks=64, scheduler=SETTINGS["small chunks"].scheduler)
        vectors = [llm.with_engine(small).embed(text)[0].vector for llm in (one, several)]
        assert vectors[0] == vectors[1]


def test_a_rank_has_its_part_of_keys_and_values(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"model": str(demo)}
    with LLM(**options) as one, with_ranks(monkeypatch, 2, options) as several:
        assert several.engine.block_bytes * 2 == one.engine.block_bytes
        assert several.engine.settings.kv_blocks > one.engine.settings.kv_blocks


def test_who_has_the_least_room_decides(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is refused that another rank has no memory for, whatever there is here."""
    options = {"model": str(demo), "kv_memory": 2**20}
    with with_ranks(monkeypatch, 2, options, kv_memory=2**28) as several:
        settings = several.engine.settings
        assert settings.kv_blocks == 2**20 // several.engine.block_bytes
        with pytest.raises(CapacityError):
            several.generate([3] * 1000, SamplingParams(max_tokens=8))


@pytest.mark.parametrize(
    "mine, theirs, said",
    [
        (
            {"quantize": 4},
            {"quantize": 8},
            "Rank 1 has quantize 8, but rank 0 4: all ranks must be started alike",
        ),
        ({"backend": "cpu"}, {"backend": "ref"}, "Rank 1 has backend ref, but rank 0 cpu"),
        ({}, {"draft_is_the_model": True}, "Rank 1 has weights"),
    ],
)
def test_ranks_that_are_not_alike_are_told_how(
    demo: Path, monkeypatch: pytest.MonkeyPatch, mine: dict[str, Any], theirs: dict[str, Any], said: str
) -> None:
    other = dict(theirs)
    model = demo / "draft" if other.pop("draft_is_the_model", False) else demo
    with pytest.raises(GroupError, match=said):
        with_ranks(monkeypatch, 2, {"model": str(model), **other}, **{"model": str(demo), **mine})


def test_ranks_of_other_instruction_sets_are_told_what_to_set(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one rounds what attention reads and another does not, tokens would depend on who has what."""
    main = threading.current_thread()
    here = "tiny_llm.engine.follower.isa"
    monkeypatch.setattr(here, lambda: "avx512bf16" if threading.current_thread() is main else "avx2")
    with pytest.raises(GroupError, match="Rank 1 has TINY_LLM_CPU_ISA avx2, but rank 0 avx512bf16"):
        with_ranks(monkeypatch, 2, {"model": str(demo)})


def test_a_model_that_cannot_be_shared_so_is_refused_by_all(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="3 ranks"):
        with_ranks(monkeypatch, 3, {"model": str(demo)})


def test_a_step_that_fails_ends_the_group_and_is_no_failed_step(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with with_ranks(monkeypatch, 2, {"model": str(demo)}) as several:
        runner = several.engine.runner
        monkeypatch.setattr(runner, "_make_room", lambda tokens, rows: 1 / 0)
        with pytest.raises(GroupError, match="A step failed: ZeroDivisionError"):
            several.generate("Once")
        with pytest.raises(GroupError):  # and so is what comes later
            several.generate("Once")
