"""Random plans of moves on the real arrays, against plain rows that are moved one after the other."""

from __future__ import annotations

import random

import mlx.core as mx
import numpy as np
import pytest

from tiny_llm.data import Batch, Pages, Plan
from tiny_llm.kv.paged import PagedCache
from tiny_llm.ops import backend
from tiny_llm.ops.kv_pool import KvFormat

LAYERS, K, D, S = 2, 2, 16, 16
BLOCKS, HOST = 24, 40
Rows = dict[tuple[int, int], float]
"""What a block's slot holds: (block, place) -> the number that its keys and values are made of."""


class Twice:
    """A paged cache, and what it must hold, said in plain rows."""

    def __init__(self, seed: int, dtype: mx.Dtype = mx.float32) -> None:
        self.chance = random.Random(seed)
        self.cache = PagedCache(KvFormat(LAYERS, K, D, S, dtype), max_blocks=BLOCKS, host_blocks=HOST)
        self.blocks = 0
        self.pool: Rows = {}
        self.host: Rows = {}
        self.written = 0
        self.outs: list[mx.array] = []

    def plan(self) -> Plan:
        """Blocks go out, some are copied, some come back: to blocks that went out a moment ago, too."""
        chance = self.chance
        self.blocks = min(BLOCKS, max(self.blocks + chance.choice((0, 0, 1, 5)), 4))
        blocks, held = range(self.blocks), sorted({slot for slot, _ in self.host})
        free = [slot for slot in range(HOST) if slot not in held]
        victims = chance.sample(blocks, chance.choice((0, 0, 1, 3)))
        swap_out = list(zip(victims, chance.sample(free, min(len(free), len(victims))), strict=False))
        targets = chance.sample(blocks, chance.choice((0, 0, 1, 2)))
        copies: list[tuple[int, int]] = []
        for target in targets:
            sources = [block for block in blocks if block not in [new for _, new in copies]]
            copies.append((chance.choice(sources), target))
        back = chance.sample(held, min(len(held), chance.choice((0, 0, 1, 3))))
        rest = [block for block in blocks if block not in targets]
        swap_in = list(zip(back, chance.sample(rest, min(len(rest), len(back))), strict=False))
        return Plan([], self.blocks, swap_out, copies, swap_in)

    def prepare(self) -> None:
        """Move on both sides, one pair after the other on the plain one."""
        plan = self.plan()
        self.cache.prepare(plan)
        for pairs, source, target in (
            (plan.swap_out, self.pool, self.host),
            (plan.copies, self.pool, self.pool),
            (plan.swap_in, self.host, self.pool),
        ):
            for old, new in pairs:
                for place in range(S):
                    target[new, place] = source.get((old, place), 0.0)
        for slot, _ in plan.swap_in:
            for place in range(S):
                del self.host[slot, place]

    def step(self) -> None:
        """Write a few rows, as a model does; whether it is waited for is left to chance."""
        places = [(block, place) for block in range(self.blocks) for place in range(S)]
        chosen = self.chance.sample(places, self.chance.randint(1, 6))
        first, self.written = self.written + 1, self.written + len(chosen)
        numbers = [float(number % 199) for number in range(first, first + len(chosen))]
        at = mx.array([block * S + place for block, place in chosen], mx.int32)
        tables = mx.array([[block] for block, _ in chosen], mx.int32)
        lens = mx.array([place + 1 for _, place in chosen], mx.int32)
        starts = mx.arange(len(chosen) + 1, dtype=mx.int32)
        pages = Pages(at, tables, starts, lens)
        batch = Batch(at, at, tuple(range(len(chosen) + 1)), at, pages)
        q = mx.broadcast_to(mx.array(numbers)[:, None, None], (len(chosen), K, D))
        self.outs = [self.cache.attend(layer, q, q + layer, -q - layer, batch) for layer in range(LAYERS)]
        self.pool.update(zip(chosen, numbers, strict=True))
        match self.chance.randrange(3):
            case 0:
                mx.eval(self.outs)
            case 1:
                mx.async_eval(self.outs)
            # else the next plan is prepared while nothing of this step has begun

    def check(self) -> None:
        """Every row that was ever written is where the plain model has it, in each layer."""
        for layer, (keys, values) in enumerate(self.cache._layers):
            found = np.array(keys.astype(mx.float32)), np.array(values.astype(mx.float32))
            for (block, place), number in self.pool.items():
                expected = number + layer if number else 0.0
                for rows, wanted in (
                    (found[0][block, :, :, place], expected),
                    (found[1][block, :, place], -expected),
                ):
                    assert (rows == wanted).all(), (
                        f"layer {layer}, block {block}, place {place}: {rows.flat[0]}, expected {wanted}"
                    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ref", "cpu"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_random_moves_leave_each_row_where_a_plain_model_has_it(name: str, dtype: mx.Dtype) -> None:
    if name == "cpu" and not backend.works():
        pytest.skip("there are no CPU kernels")
    with backend.use(name):
        for seed in range(8):
            twice = Twice(seed, dtype)
            for number in range(30):
                twice.prepare()
                twice.step()
                if number % 10 == 9:
                    twice.check()
