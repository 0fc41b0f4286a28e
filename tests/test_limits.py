"""Every number that an operator sets in a program: it works, or is refused by an error that names it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from math import inf, nan
from typing import Any

import pytest

from tiny_llm.data import Advance, Sequence
from tiny_llm.errors import ConfigError
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.server.run import Server, listen
from tiny_llm.server.service import Service
from tiny_llm.server.settings import ServerSettings

TRIED: tuple[Any, ...] = (
    -(10**30),
    -1,
    -0.5,
    0,
    1,
    1.5,
    1e-320,
    10**9,
    10**30,
    1e308,
    inf,
    -inf,
    nan,
    True,
    "2",
)


def numeric(settings: type[Any]) -> Iterator[str]:
    """The fields that hold a number."""
    for field in fields(settings):
        if field.type in ("int", "float", "float | None"):
            yield field.name


def serve_all(settings: SchedulerSettings) -> None:
    """Three requests of different urgency, to their ends."""
    scheduler = Scheduler(BlockManager(4, 100), settings)
    for number in range(min(3, settings.max_num_seqs + settings.max_queued_requests)):
        params = SamplingParams(max_tokens=3)
        scheduler.add(
            Sequence(number, [number] * 9, params, priority=100 * number - 100, arrival=float(number))
        )
    for _ in range(100):
        assert not scheduler.expire(0.0)
        plan = scheduler.schedule()
        ends = {item.seq_id: len(scheduler.sequence(item.seq_id).tokens) == 11 for item in plan.items}
        drawing = [item.seq_id for item in plan.items if item.logit_rows]
        scheduler.commit(plan, [Advance(one, (1,), "length" if ends[one] else None) for one in drawing])
        scheduler.speed.observe(plan, 1.0)
    assert len(scheduler) == 0, "nobody waits for ever"


@pytest.mark.parametrize("name", list(numeric(SchedulerSettings)))
@pytest.mark.parametrize("value", TRIED, ids=repr)
def test_a_scheduler_works_with_any_number_that_it_takes(name: str, value: Any) -> None:
    try:
        settings = SchedulerSettings(**{"max_num_batched_tokens": 10**9, name: value})
    except ConfigError as error:
        assert name in str(error) and "but must be" in str(error)
    else:
        serve_all(settings)


@pytest.mark.parametrize("name", list(numeric(ServerSettings)))
@pytest.mark.parametrize("value", TRIED, ids=repr)
def test_a_server_starts_with_any_number_that_it_takes(name: str, value: Any) -> None:
    def load() -> Any:
        raise AssertionError("nothing is loaded here")

    try:
        settings = ServerSettings(**{name: value})
    except ConfigError as error:
        assert name in str(error) and "but must be" in str(error)
    else:
        with listen("127.0.0.1", 0) as listening:
            Server(Service(settings, load), listening)
