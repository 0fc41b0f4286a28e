"""One memory for several models: never more, each its part when it asks, the rest to whoever is busy."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tiny_llm import LLM, AsyncLLM, CapacityError, SamplingParams
from tiny_llm.engine.budget import MemoryBudget, PoolLimit, Share
from tiny_llm.engine.engine import Engine
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import SchedulerSettings

ASKED = SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.0, seed=5)
BLOCK = 16


def blocks_of(share: Share, llm: LLM) -> tuple[int, int]:
    """Held and used."""
    return share.held // llm.engine.block_bytes, share.used // llm.engine.block_bytes


@contextmanager
def several(
    folder: Path, count: int, blocks: int, beside: int = 0, swaps: bool = False
) -> Iterator[tuple[MemoryBudget, list[AsyncLLM], Callable[[], int]]]:
    """``count`` models, and ``beside`` that are not loaded, with a budget of so many blocks in all.

    Whatever they do, no more is held. The last one tells the most that was held.
    """
    with LLM(folder) as llm:
        budget = MemoryBudget(blocks * llm.engine.block_bytes, count + beside)
        host = (
            {"swap_memory": budget.total, "scheduler": SchedulerSettings(preemption="swap")} if swaps else {}
        )
    llms = [AsyncLLM(folder, kv_memory=budget.share(), threads=1, **host) for _ in range(count)]
    most = [0]

    def look(llm: AsyncLLM) -> Callable[[], None]:
        def after_step() -> None:
            with budget.changed:
                held = sum(share.held for share in budget.shares)
                most[0] = max(most[0], held)
                engine = llm.llm.engine
                share = engine.settings.share
                there = (
                    sum(array.nbytes for array in engine.cache.arrays()) if llm.llm.backend == "ref" else 0
                )
                assert share is not None and held <= budget.total
                assert max(there, engine.scheduler.blocks.capacity * engine.block_bytes) <= share.held

        return after_step

    for llm in llms:
        llm.after_step = look(llm)
    try:
        yield budget, llms, lambda: most[0]
    finally:
        for llm in llms:
            assert llm.restarts == 0, "a look found something wrong"
            llm.close()
        assert not any(share.held or share.used or share.asked for share in budget.shares)


@pytest.fixture(scope="module")
def small(demo: Path) -> Path:
    return demo / "draft"


@pytest.fixture(scope="module")
def expected(small: Path) -> Callable[[list[int]], list[int]]:
    with LLM(small) as llm:
        known: dict[str, list[int]] = {}

        def answer(prompt: list[int]) -> list[int]:
            if str(prompt) not in known:
                known[str(prompt)] = llm.generate([prompt], ASKED)[0].token_ids
            return known[str(prompt)]

        for number in range(40):
            answer(prompt_of(number))
    return lambda prompt: known[str(prompt)]


def prompt_of(number: int) -> list[int]:
    return [3 + number % 40] * (20 + 9 * (number % 40 % 7))


async def ask(llm: AsyncLLM, number: int) -> list[int]:
    return (await asyncio.wait_for(llm.generate(prompt_of(number), ASKED), 60))[0].token_ids


async def ask_all(llm: AsyncLLM, count: int) -> list[list[int]]:
    return await asyncio.gather(*(ask(llm, number) for number in range(count)))


@pytest.mark.slow
def test_a_busy_one_has_what_the_others_leave_and_each_starts_when_asked(
    small: Path, expected: Callable[[list[int]], list[int]]
) -> None:
    """Of three parts it has all. Then another's first request comes, and ends long before the others."""
    with several(small, 2, 48, beside=1) as (budget, (busy, light), most):
        scheduler = busy.llm.engine.scheduler
        ended = []

        async def beside() -> None:
            while budget.shares[0].held < budget.total:
                await asyncio.sleep(0.001)
            assert await ask(light, 0) == expected(prompt_of(0))
            ended.append(len(scheduler))

        async def both() -> list[list[int]]:
            many = asyncio.ensure_future(ask_all(busy, 60))
            await beside()
            return await many

        assert asyncio.run(both()) == [expected(prompt_of(number)) for number in range(60)]
        assert most() == budget.total and ended[0] > 20, "most of the busy one's were still to come"


def test_what_was_lent_is_given_back_in_a_step(small: Path) -> None:
    """One that runs alone holds two parts; what the other asks for is taken from those that came last."""
    params = replace(ASKED, max_tokens=60)
    with LLM(small) as alone:
        budget = MemoryBudget(16 * alone.engine.block_bytes, 2)
        answers = alone.generate([prompt_of(number) for number in range(4)], params)
    expected = [answer.token_ids for answer in answers]
    with LLM(small, kv_memory=budget.share()) as first, LLM(small, kv_memory=budget.share()) as second:
        one, two = first.engine, second.engine
        ended: dict[Engine, dict[int, list[int]]] = {one: {}, two: {}}

        def step(engine: Engine) -> None:
            found = [(number, chunk.completion) for number, chunk in engine.step()]
            ended[engine] |= {number: completion.token_ids for number, completion in found if completion}
            assert sum(share.held for share in budget.shares) <= budget.total

        for number in range(4):
            one.add(prompt_of(number), params)
        while blocks_of(budget.shares[0], first) != (16, 16):
            assert len(one) == 4
            step(one)
        running = one.scheduler.num_running
        two.add(prompt_of(2), params)
        begun = time.perf_counter()
        step(two)
        assert two.scheduler.num_running == 0 and budget.shares[1].asked
        assert time.perf_counter() - begun > 0.01, "it waits, and does not ask again and again"
        step(one)  # perhaps one was under way
        step(one)
        assert one.scheduler.num_running < running and budget.shares[0].held <= 13 * one.block_bytes
        step(two)
        assert two.scheduler.num_running == 1
        while len(two):
            step(two)
            step(one)
        while len(one):
            step(one)
            two.give_back()
        assert list(ended[two].values()) == expected[2:3]
        assert [tokens for _, tokens in sorted(ended[one].items())] == expected


@pytest.mark.slow
def test_what_an_idle_one_has_cached_goes_before_somebody_gives_way(small: Path) -> None:
    """It is idle, so its thread must be told; and whoever runs waits for that."""
    with several(small, 2, 32) as (budget, (first, second), _):
        asyncio.run(ask_all(first, 12))
        held, used = blocks_of(budget.shares[0], first.llm)
        assert held > 16 and used == 0
        long = SamplingParams(max_tokens=150, ignore_eos=True)

        async def two() -> None:
            await asyncio.gather(*(second.generate([number] * 40, long) for number in (5, 6)))

        asyncio.run(two())
        assert sum(second.llm.engine.scheduler.preempted.values()) == 0
        assert blocks_of(budget.shares[1], second.llm)[0] > 16
        with pytest.raises(
            CapacityError, match="there are 16"
        ):  # more than its part, which is all it can rely on
            asyncio.run(second.generate([7] * 300, ASKED))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_any_traffic_on_three_ends_with_the_same_tokens(
    small: Path, seed: int, expected: Callable[[list[int]], list[int]]
) -> None:
    """Bursts, pauses, and some who leave; one is unloaded in between. Some give way to the host."""
    chance = random.Random(seed)
    with several(small, 3, 36, swaps=seed % 2 == 1) as (budget, llms, most):

        async def traffic(llm: AsyncLLM, chance: random.Random) -> None:
            for _ in range(6):
                numbers = [chance.randrange(40) for _ in range(chance.choice((1, 2, 12)))]
                asking = [asyncio.ensure_future(ask(llm, number)) for number in numbers]
                if chance.random() < 0.3:
                    await asyncio.sleep(chance.random() / 20)
                    asking.pop().cancel()
                    numbers.pop()
                assert await asyncio.gather(*asking) == [expected(prompt_of(number)) for number in numbers]
                await asyncio.sleep(chance.choice((0, 0, 0.05)))

        async def all_three() -> None:
            each = [traffic(llm, random.Random(chance.random())) for llm in llms]
            await asyncio.gather(*each)
            await asyncio.to_thread(llms[0].close)
            assert budget.shares[0].held == 0
            await asyncio.gather(*(ask_all(llm, 12) for llm in llms[1:]))

        asyncio.run(all_three())
        assert most() > budget.total * 0.9
        assert not any(llm.llm.engine.scheduler.usage().used for llm in llms[1:])


def settle(budget: MemoryBudget) -> None:
    """Each gives back what it is to, as an engine does between steps."""
    for share in budget.shares:
        used = min(share.used // share.unit, share.most_used)
        share.note(min(share.held // share.unit, max(used, share.unasked)), used)


def test_shares_never_exceed_the_budget_and_each_gets_its_part() -> None:
    """Whatever was before: who asks for no more than its part has room for it once the others have acted."""
    chance = random.Random(1)
    for _ in range(80):
        budget = MemoryBudget(chance.randint(40, 200), chance.randint(2, 4))
        shares = [budget.share() for _ in range(chance.randint(2, len(budget.shares) + 2))]
        shares = shares[: budget.total // budget.part]
        for share in shares:
            share.open(chance.randint(1, 4))
        for _ in range(60):
            share = chance.choice(shares)
            wanted = chance.randint(0, budget.total // share.unit)
            held = min(wanted, share.room)
            share.ask(wanted if held < wanted else 0)
            share.note(held, chance.randint(0, held))
            assert sum(one.held for one in shares) <= budget.total
            if chance.random() < 0.5:
                settle(budget)
            for one in shares:
                settle(budget)
                assert one.room * one.unit >= min(one.part, one.asked)
        for one in shares:
            one.close()
        assert all(one.room == budget.total // one.unit for one in shares)


def test_who_asked_first_for_more_than_its_part_gets_it_first() -> None:
    budget = MemoryBudget(120, 3)
    first, second, third = (budget.share() for _ in range(3))
    for share, held in ((first, 40), (second, 40), (third, 30)):
        share.note(held, held)
    first.ask(55)
    second.ask(52)
    assert (first.room, second.room, third.most_used) == (50, 40, 40), "10 are free: the first one's"
    third.note(25, 25)
    assert (first.room, second.room) == (55, 40)
    third.note(20, 20)
    assert (first.room, second.room) == (60, 45), "what is beyond what the first asked for is the second's"
    first.ask(0)
    assert second.room == 60


def test_nobody_gives_up_its_part_for_what_another_has_beyond_its_own() -> None:
    budget = MemoryBudget(120, 3)
    large, fair, new = (budget.share() for _ in range(3))
    large.note(80, 80)
    fair.note(40, 40)
    new.ask(30)
    assert (large.most_used, fair.most_used) == (50, 40)


def test_a_pool_takes_of_its_share_only_while_a_step_is_planned() -> None:
    """Another's planning waits that long, and then sees what was taken."""
    budget = MemoryBudget(40, 2)
    managers = [BlockManager(BLOCK, 20, slab=4) for _ in range(2)]
    limits = [PoolLimit(40, 4, 1, 0, lambda: 0.0, budget.share()) for _ in managers]
    for share in budget.shares:
        share.open(4)
    seen = []

    def plan(number: int) -> None:
        with limits[number].planning(Scheduler(managers[number])):
            seen.append(managers[number].max_blocks)

    managers[0].set_limit(40)
    managers[1].set_limit(40)
    with limits[0].planning(Scheduler(managers[0])):
        other = threading.Thread(target=plan, args=(1,))
        other.start()
        other.join(0.05)
        assert seen == [] and managers[0].max_blocks == 40
        managers[0].grow(24)
    other.join(5)
    assert seen == [16]
    assert [one.max_blocks for one in managers] == [40, 40], "between plans it says what there might be"


def test_no_pool_grows_into_what_is_promised_to_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiny_llm.engine.budget.available_memory_bytes", lambda: 1000)
    monkeypatch.setattr("tiny_llm.engine.budget.give_back_memory", lambda: None)
    budget = MemoryBudget(2000, 2)
    limit = PoolLimit(200, 4, 10, 0, lambda: 0.0, budget.share())
    assert limit.blocks(20) == 120
    budget.loading = 900
    assert limit.blocks(20) == 30, "no time has passed, and the machine has as much"
