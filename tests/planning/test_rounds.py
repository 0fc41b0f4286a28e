"""Timing that can be trusted: what is computed when the clock stops, whose turn it is, what is counted."""

from __future__ import annotations

import io
from collections.abc import Callable

import mlx.core as mx
import pytest

from tiny_llm.planning import rounds
from tiny_llm.planning.rounds import Rate, Trial, interleave, seconds_of

pytestmark = pytest.mark.chapter("2.2")


def is_computed(array: mx.array) -> bool:
    """Whether no operation is left to do for it."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return "label" not in graph.getvalue()


def runs(order: list[str], name: str, *seconds: float) -> Callable[[], float]:
    """A run that notes its turn, and says that it took the next of ``seconds``."""
    answers = iter(seconds)

    def run() -> float:
        order.append(name)
        return next(answers)

    return run


def test_the_clock_stops_when_the_arrays_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    made, looks = list[mx.array](), list[list[bool]]()

    def make() -> list[mx.array]:
        assert not made, "make was called twice"
        made.extend([mx.ones((4, 4)) @ mx.ones((4, 4)), mx.exp(mx.ones(3))])
        return made

    def clock() -> float:
        looks.append([is_computed(array) for array in made])
        return 10.0 * len(looks)

    monkeypatch.setattr(rounds.time, "perf_counter", clock)
    assert seconds_of(make) == 10.0, "one look at the clock before, one after"
    assert looks == [[], [True, True]], "what was made must be computed before the clock is read again"


def test_what_is_no_array_can_be_timed() -> None:
    assert seconds_of(lambda: "text") >= 0


def test_a_short_time_is_no_round_number(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.5, 0.5 + 2**-30))
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: next(clock))
    assert seconds_of(lambda: None) == 2**-30, "as the clock has it"


def test_turns_are_taken() -> None:
    order: list[str] = []
    sides = [Trial((name,), 1.0, runs(order, name, 1, 1, 1, 1, 0.125)) for name in "bca"]
    rates = interleave(sides, 5, pause=0)
    assert "".join(order) == "bca" * 5, "each side once a round, in the order that was given"
    assert {*rates.values()} == {Rate(1.0, 1.0, 8.0)}, "all rounds count"


def test_rates_are_units_over_seconds_and_their_median_counts() -> None:
    trial = Trial(("x",), 8.0, lambda: 0.0)
    assert Rate.of(trial, [1.0, 4.0, 2.0]) == Rate(4.0, 2.0, 8.0)
    assert Rate.of(trial, [2.0, 2.0, 80.0]).median == 4.0, "one interruption must not count"


def test_a_kind_of_rate_makes_its_own_kind() -> None:
    class Mine(Rate):
        pass

    assert type(Mine.of(Trial(("x",), 8.0, lambda: 0.0), [1.0])) is Mine, "a class method says which"


def test_of_an_even_number_the_median_lies_between() -> None:
    assert Rate.of(Trial(("x",), 8.0, lambda: 0.0), [1.0, 2.0]) == Rate(6.0, 4.0, 8.0)


def test_sides_may_come_one_by_one() -> None:
    order: list[str] = []
    sides = (Trial((name,), 1.0, runs(order, name, 1, 1)) for name in "ab")
    assert set(interleave(sides, 2, pause=0)) == {("a",), ("b",)} and "".join(order) == "abab"


def test_there_is_a_pause_after_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(rounds.time, "sleep", lambda seconds: order.append(f"sleep {seconds}"))
    sides = [Trial((name,), 1.0, runs(order, name, 1, 1, 1)) for name in "ab"]
    once = Trial(("once",), 1.0, runs(order, "once", 1), once=True)
    interleave([*sides, once], 2, warm_up=1, pause=0.25)
    turns = ["a", "b", "a", "b", "once", "a", "b"]
    assert order == [each for turn in turns for each in (turn, "sleep 0.25")], (
        "warming up, too; who sits out has none"
    )


def test_the_clock_runs_while_the_work_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: float(len(order)))
    assert seconds_of(lambda: order.append("described")) == 1.0
    assert order == ["described"], "it is called once"


def test_once_is_once() -> None:
    order: list[str] = []
    sides = [
        Trial(("a",), 8.0, runs(order, "a", 9, 1, 4, 2)),
        Trial(("b",), 5.0, runs(order, "b", 10), once=True),
    ]
    rates = interleave(sides, 3, warm_up=1, pause=0)
    assert order == ["a", "a", "b", "a", "a"]
    assert rates == {("a",): Rate(4.0, 2.0, 8.0), ("b",): Rate(0.5, 0.5, 0.5)}


def test_warming_up_is_not_counted() -> None:
    order: list[str] = []
    sides = [Trial((name,), 1.0, runs(order, name, 50, 40, 1, 1)) for name in "ab"]
    rates = interleave(sides, 2, warm_up=2, pause=0)
    assert "".join(order) == "abababab"
    assert rates == {(name,): Rate(1.0, 1.0, 1.0) for name in "ab"}
