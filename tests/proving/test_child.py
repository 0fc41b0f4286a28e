"""What a trial calls wrong, and how it takes times."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import mlx.core as mx
import pytest

from tiny_llm.metalsim.build import why_not
from tiny_llm.ops.backend import runs_ours, use
from tiny_llm.proving.cases import Check, Sizes, TimedCall
from tiny_llm.proving.child import CHAIN, TURNS, difference, prove, timing
from tiny_llm.proving.record import Shapes

ONES = mx.ones(4)


@pytest.fixture(autouse=True)
def _simulator() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.mark.parametrize(
    ("got", "tolerance", "problem"),
    [
        (ONES, 0.0, ""),
        (ONES + 1e-3, 2e-3, ""),
        (ONES + 1e-3, 1e-4, "off by 0.001 of the largest value, allowed 0.0001"),
        (mx.array([1.0, mx.nan, 1.0, 1.0]), 0.5, "off by nan of the largest value, allowed 0.5"),
        (mx.array([1.0, mx.inf, 1.0, 1.0]), 0.5, "off by inf of the largest value, allowed 0.5"),
        (ONES + 1e-6, 0.0, "other bits"),
        (ONES[:3], 0.5, "got mlx.core.float32 (3,), expected mlx.core.float32 (4,)"),
        (ONES.astype(mx.float16), 0.5, "got mlx.core.float16 (4,), expected mlx.core.float32 (4,)"),
    ],
)
def test_what_is_wrong_is_said(got: mx.array, tolerance: float, problem: str) -> None:
    assert difference(Check("", lambda: [got], lambda: [ONES], tolerance)) == problem


def test_an_answer_too_few_is_an_error_of_the_op(shapes: Shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Check("a norm", lambda: [], lambda: [ONES])
    monkeypatch.setattr("tiny_llm.proving.child.cases", lambda *_: iter([few]))
    assert prove("rms_norm", shapes, Sizes.small(), lambda _: None).wrong.startswith("a norm: ValueError")


def test_sides_take_turns_after_calls_that_only_compile() -> None:
    ours: list[bool] = []

    def step(state: Sequence[mx.array], _: int) -> Sequence[mx.array]:
        ours.append(runs_ours("rope"))
        return [state[0] + 1]

    with use("metalsim", frozenset({"rope"})):
        found = timing(TimedCall("1 row", lambda: [ONES], step))
    assert found.ours_us > 0 and found.mlx_us > 0
    assert ours[:4] == [True, True, False, False], "two calls a side are not counted"
    turns = [(side, len(list(calls))) for side, calls in groupby(ours[4:])]
    assert [side for side, _ in turns] == [True, False] * TURNS
    assert len({count for side, count in turns if side}) == 1 and max(count for _, count in turns) <= CHAIN


def test_each_call_gets_a_number_of_its_own_so_that_matrices_take_turns() -> None:
    numbers: list[int] = []

    def step(state: Sequence[mx.array], number: int) -> Sequence[mx.array]:
        if runs_ours("rope"):
            numbers.append(number)
        return [state[0] + 1]

    with use("metalsim", frozenset({"rope"})):
        timing(TimedCall("1 row", lambda: [ONES], step))
    assert numbers == list(range(len(numbers)))
