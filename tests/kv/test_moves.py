"""A fuzzer: the real arrays under real plans, against a plain dictionary of what each token's rows are.

Requests that begin alike come, fork, guess, give way, are swapped out and cancelled, in a pool that is too
small; what leaves it goes to disk and comes back. ``make fuzz`` runs more of it: see $TINY_LLM_FUZZ.
"""

from __future__ import annotations

import os
import random
from array import array
from collections import Counter
from collections.abc import Iterable
from math import inf
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest

from tiny_llm.data import Advance, EndReason, Plan, Sequence
from tiny_llm.engine.batch import build_batch
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.kv.disk import BlockStore
from tiny_llm.kv.paged import PagedCache
from tiny_llm.ops import backend
from tiny_llm.ops.kv_pool import KvFormat, settled
from tiny_llm.ops.paged_attention import quantized
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import SchedulerSettings

LAYERS, K, D, S = 2, 2, 16, 16
BLOCKS, HOST = 7, 24
ROWS = 4099
"""Different ones, for more tokens than there are at a time."""
RUNS = max(6, int(os.environ.get("TINY_LLM_FUZZ") or 0) // 100)
STEPS = 80
EVENTS = {"saved", "loaded", "copied", "swapped-out", "swapped-in", "swap", "recompute", "found", "ahead"}
EVENTS |= {"left", "for-nothing", "forked", "right", "wrong", "ended", "cancelled", "lost", "rested", "moved"}


class Fuzz:
    """A scheduler, the arrays that its plans move, and what they must hold, in a dictionary.

    A token's rows are those of its number, and that is of the number of the token before it and itself.
    """

    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self, seed: int, dtype: mx.Dtype, store: BlockStore) -> None:
        self.chance = chance = random.Random(seed)
        most, host = chance.randint(2, 6), chance.choice((0, 7, HOST))
        settings = SchedulerSettings(
            max_num_seqs=most,
            max_num_batched_tokens=most + chance.randint(1, 60),
            max_step_ms=inf,
            preemption=chance.choice(("swap", "recompute")),
        )
        self.window = (17, 44, 30, 0)[seed % 4]
        slab = chance.randint(1, 5)
        blocks = BlockManager(S, BLOCKS, slab=slab, host_blocks=host, store=store, window=self.window)
        self.store = store
        self.scheduler = Scheduler(blocks, settings, drafters={"fuzz": self.draft})
        format = KvFormat(LAYERS, K, D, S, dtype, token_major=False)
        self.cache = PagedCache(format, max_blocks=BLOCKS, host_blocks=host)
        self.numbers: dict[tuple[int, int], int] = {}
        rows = mx.random.normal((ROWS * LAYERS * 2, K, D), key=mx.random.key(seed))
        self.rows = rows.reshape(ROWS, LAYERS, 2, K, D)
        kept = quantized(rows) if dtype == mx.int8 else (rows.astype(dtype),)
        self.kept = [as_numpy(one).reshape(ROWS, LAYERS, 2, *one.shape[1:]) for one in kept]
        self.texts: list[array[int]] = [array("i")]
        self.ids = 0
        self.ahead: Plan | None = None
        self.outs: list[mx.array] = []

    def run(self) -> None:
        """Steps, and what may happen between them."""
        for number in range(STEPS):
            while len(self.scheduler) < 6 and self.chance.random() < 0.5:
                self.arrive()
            self.step()
            self.disturb()
            if number % 3 == 0:
                self.check()
        while len(self.scheduler):
            self.step()
            self.check()
        for name in ("recompute", "swap"):
            self.seen[name] += self.scheduler.preempted[name]

    def arrive(self) -> None:
        """A request, which begins like others, or with all of what has ended."""
        chance = self.chance
        same = array("i", [chance.randint(0, 1)] * chance.choice((0, 20, 33, 48)))
        prompt = chance.choice((same, chance.choice(self.texts)))[:64]
        prompt.extend(chance.choices(range(2), k=chance.randint(1, 5)))
        # With a short window an answer may be longer than the pool.
        most = chance.choice((44, 150)) if 0 < self.window <= 30 else min(44, BLOCKS * S - len(prompt))
        longest = chance.randint(1, most)
        params = SamplingParams(max_tokens=longest, n=chance.choice((1, 1, 1, 3)))
        salt = chance.choice(("", "", "key"))
        seq = Sequence(self.new_id(), prompt, params, chance.randint(-1, 1), salt=salt)
        self.scheduler.add(seq)

    def new_id(self) -> int:
        self.ids += 1
        return self.ids

    def draft(self, seq: Sequence, most: int) -> array[int]:
        return array("i", self.chance.choices(range(2), k=min(most, self.chance.choice((0, 0, 2, 20)))))

    def step(self) -> None:
        """One step, and now and then the next one before its tokens are known, as the engine does."""
        plan, self.ahead = self.ahead or self.launched(self.scheduler.schedule(), []), None
        advances = list(self.advances(plan))
        drawn = [token for advance in advances for token in list(advance.tokens)[:1]]
        if len(drawn) == len(plan.items) and not any(one.forks for one in advances):
            leaving = {one.seq_id for one in advances if one.finish_reason == "length"}
            following = self.scheduler.follow(plan, leaving)
            self.ahead = following and self.launched(following, drawn)
            self.seen["ahead"] += following is not None
        for content, data in self.cache.saved():
            self.store.write(content, data, wait=True)
        for seq in self.scheduler.commit(plan, advances):
            if seq.finish_reason:
                self.texts.append(seq.tokens)
                self.seen["ended"] += 1
        self.scheduler.speed.observe(plan, 1000.0)  # the disk is faster
        self.scheduler.check_integrity()
        for name, moves in (("saved", plan.save), ("loaded", plan.load), ("copied", plan.copies)):
            self.seen[name] += len(moves)
        self.seen["swapped-out"] += len(plan.swap_out)
        self.seen["swapped-in"] += len(plan.swap_in)

    def launched(self, plan: Plan, drawn: list[int]) -> Plan:
        """Move, then write a step's rows, as a model does; whether it is waited for is left to chance."""
        if not plan.items:
            return plan
        batch = build_batch(plan, S, mx.array(drawn, mx.int32) if drawn else None)
        self.cache.save(plan.save)
        self.cache.prepare(plan)
        self.cache.load(plan.load)
        chosen: list[int] = []
        for item in plan.items:
            seq = self.scheduler.sequence(item.seq_id)
            assert seq is not None
            tokens = [drawn[-1 - token] if token < 0 else token for token in item.tokens]
            chosen += self.numbers_of(seq.salt, [*seq.tokens[: item.start], *tokens])[item.start :]
        rows = self.rows[mx.array(chosen, mx.int32)]
        self.outs = [
            self.cache.attend(layer, x[:, 0], x[:, 0], x[:, 1], batch, window=self.window)
            for layer, x in enumerate(rows.swapaxes(0, 1))
        ]
        match self.chance.randrange(3):
            case 0:
                mx.eval(self.outs)
            case 1:
                mx.async_eval(self.outs)  # type: ignore[no-untyped-call]  # MLX's stubs lack its types
            # else the next plan is prepared while nothing of this step has begun
        return plan

    def advances(self, plan: Plan) -> Iterable[Advance]:
        """What a model would draw; it goes along with half of the guesses."""
        for item in plan.items:
            seq = self.scheduler.sequence(item.seq_id)
            if seq is None:
                self.seen["for-nothing"] += 1
                yield Advance(item.seq_id, ())
            elif item.logit_rows:
                begins = len(seq.tokens) == seq.prompt_len
                self.seen["found"] += begins and seq.cached_tokens
                guesses = item.tokens[len(item.tokens) - item.logit_rows + 1 :]
                right = next((n for n in range(len(guesses)) if self.chance.random() < 0.5), len(guesses))
                self.seen["right"] += right
                self.seen["wrong"] += len(guesses) - right
                forks = range(1, seq.params.n if begins and len(self.scheduler) < 20 else 1)
                first = self.drawn(seq, item.seq_id, guesses[:right])
                yield first._replace(forks=tuple(self.drawn(seq, self.new_id(), guesses[:0]) for _ in forks))

    def drawn(self, seq: Sequence, seq_id: int, right: array[int]) -> Advance:
        """The tokens that were guessed right and one more, as far as the answer may go."""
        self.seen["forked"] += seq_id != seq.id
        left = seq.prompt_len + seq.params.max_tokens - len(seq.tokens)
        tokens = [*right, self.chance.randrange(2)][:left]
        reason: EndReason | None = "stop" if self.chance.random() < 0.01 else None
        return Advance(seq_id, tokens, "length" if len(tokens) == left else reason)

    def disturb(self) -> None:
        """Somebody leaves, a step fails, or nobody asks for a while."""
        if self.chance.random() < 0.05 and self.ids:
            gone = self.scheduler.cancel(self.chance.randint(1, self.ids))
            self.seen["cancelled"] += gone is not None
        if self.chance.random() < 0.01 and self.ahead is None:
            plan = self.scheduler.schedule()
            self.scheduler.abandon(plan)
            self.scheduler.blocks.shrink()
            self.cache.clear()
            self.seen["lost"] += 1
        if self.chance.random() < 0.1 and self.ahead is None:
            self.shrink()
        if not len(self.scheduler):
            self.ahead = None
            self.rest()

    def shrink(self) -> None:
        """Memory goes, and comes back; used blocks at the pool's end move to the front."""
        blocks = self.scheduler.blocks
        blocks.set_limit(self.chance.randint(1, BLOCKS))
        blocks.shrink(self.scheduler.tables(), blocks.limit)
        plan = blocks.drain()
        self.cache.save(plan.save)
        self.cache.prepare(plan)
        self.seen["moved"] += len(plan.copies)
        blocks.set_limit(BLOCKS)

    def rest(self) -> None:
        """What is cached goes to disk, and the pool goes."""
        self.cache.save(self.scheduler.blocks.unsaved())
        for content, data in self.cache.saved():
            self.store.write(content, data, wait=True)
        self.scheduler.blocks.shrink()
        self.cache.clear()
        self.seen["rested"] += 1

    def numbers_of(self, salt: str, tokens: Iterable[int]) -> list[int]:
        """The numbers of a text's tokens; ``ROWS`` of them have rows of their own."""
        number, found = -1 - len(salt), []
        for token in tokens:
            number = self.numbers.setdefault((number, token), len(self.numbers))
            found.append(number % ROWS)
        return found

    def check(self) -> None:
        """The rows that a running sequence may see are where its table says, in each layer, bit for bit."""
        running = self.scheduler.running()
        for layer, pool in enumerate(self.cache._layers):
            keys, values, *scales = map(as_numpy, settled(pool))
            arrays = [(keys.transpose(0, 3, 1, 2), values.transpose(0, 2, 1, 3))]  # both [N, S, K, D]
            arrays += [(scales[0].transpose(0, 2, 1), scales[1].transpose(0, 2, 1))] if scales else []
            for seq, table in running:
                count = seq.num_computed_tokens
                first = max(0, count + 1 - self.window) if self.window else 0
                self.seen["left"] += table.gone
                numbers = self.numbers_of(seq.salt, seq.tokens[:count])
                for kept, both in zip(self.kept, arrays, strict=True):
                    for which, rows in enumerate(both):
                        found = rows[table.blocks].reshape(-1, *rows.shape[2:])[:count]
                        wrong = (found != kept[numbers, layer, which]).reshape(count, -1).any(axis=1)[first:]
                        assert not wrong.any(), (
                            f"sequence {seq.id}, layer {layer}, {'values' if which else 'keys'}: "
                            f"another's at {wrong.nonzero()[0].tolist()} of {count}"
                        )


def as_numpy(array: mx.array) -> np.ndarray:
    """What numpy has no name for as float32, which holds all of it."""
    return np.array(array.astype(mx.float32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ref", "cpu"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.int8], ids=str)
def test_each_row_lies_where_a_dictionary_has_it(name: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    if name == "cpu" and not backend.works():
        pytest.skip("there are no CPU kernels")
    Fuzz.seen.clear()
    with backend.use(name):
        for seed in range(RUNS):
            store = BlockStore(tmp_path / str(seed), 10**9, bytes(32))
            try:
                Fuzz(seed, dtype, store).run()
            finally:
                store.close()
    missing = EVENTS - set(+Fuzz.seen)
    assert not missing, f"never seen: {missing}"
