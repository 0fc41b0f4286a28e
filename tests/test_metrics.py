"""Counters count, from several threads too."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tiny_llm.metrics import Counts, fallbacks


def test_each_name_is_counted() -> None:
    counts = Counts()
    for name in ("rope", "linear", "rope"):
        counts.add(name)
    assert counts.read() == {"rope": 2, "linear": 1}


def test_no_count_is_lost_between_threads() -> None:
    counts = Counts()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: [counts.add("x") for _ in range(1000)], range(8)))
    assert counts.read() == {"x": 8000}


def test_what_is_read_is_a_copy() -> None:
    counts = Counts()
    counts.read()["x"] = 5
    assert counts.read() == {}


def test_fallbacks_are_one_for_the_process() -> None:
    assert fallbacks() is fallbacks()
