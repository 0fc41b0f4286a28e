"""Argmax: the lowest place among equals, on every backend."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx
import pytest

from tiny_llm.ops import backend
from tiny_llm.ops.argmax import argmax, largest, largest_ref

INF, NAN = math.inf, math.nan


@pytest.fixture(params=["ref", "cpu"], autouse=True)
def on_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of this file, once on each backend."""
    if request.param == "cpu" and not backend.works():
        pytest.skip("the CPU kernels are not built")
    with backend.use(request.param):
        yield


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ([7.0], 0),
        ([0.0, 3.0, 3.0, -1.0], 1),
        ([-0.0, 0.0], 0),
        ([-INF, -INF], 0),
        ([-INF, -2.0, -INF, -2.0], 1),
        ([1.0, INF, INF], 1),
        ([1.0, INF, NAN, NAN], 2),
    ],
)
def test_by_hand(row: list[float], place: int) -> None:
    got = argmax(mx.array([row, row]))
    assert got.dtype == mx.uint32 and got.tolist() == [place, place]


@pytest.mark.parametrize("width", [1, 5, 16, 1000, 16384, 16385, 50000])
def test_as_mlx_with_many_equals_and_in_any_layout(width: int) -> None:
    x = mx.round(mx.random.normal((3, 2, width), key=mx.random.key(width)) * 2)
    assert argmax(x).tolist() == mx.argmax(x, axis=-1).tolist()
    assert argmax(x.transpose(2, 1, 0)).tolist() == mx.argmax(x.transpose(2, 1, 0), axis=-1).tolist()


def test_half_precision_and_no_values() -> None:
    assert argmax(mx.array([1.0, 3.0, 2.0], mx.bfloat16)).item() == 1
    with pytest.raises(ValueError, match=r"\[argmax\] expected at least one value a row, got shape \(2, 0\)"):
        argmax(mx.zeros((2, 0)))


@pytest.mark.parametrize("width", [1, 5, 128, 129, 1000, 40000])
def test_the_largest_few_as_a_whole_sort_has_them(width: int) -> None:
    """Many are equal, and some rows have hardly a number: blocks that are left out must not be missed."""
    x = mx.round(mx.random.normal((4, width), key=mx.random.key(width)) * 3)
    x[1] = -mx.inf
    x[2, 1:] = -mx.inf
    x[3, : width // 2] = x[3, width // 2 : 2 * (width // 2)]
    for count in {0, 1, 2, min(7, width), min(50, width), width}:
        assert mx.array_equal(largest(x, count), largest_ref(x, count)), count


def test_the_largest_few_of_a_wide_row_are_found_without_sorting_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_widths: list[int] = []

    def spy(x: mx.array, axis: int) -> mx.array:
        sorted_widths.append(x.shape[axis])
        return sort(x, axis=axis)

    sort = mx.argsort
    monkeypatch.setattr(mx, "argsort", spy)
    largest(mx.zeros((2, 152_000)), 20)
    assert max(sorted_widths) < 4000
