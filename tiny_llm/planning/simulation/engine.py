"""Owns one simulated engine: the real scheduler over real accounts, and a clock that costs of steps turn.

Tokens are numbers that nobody reads. A stretch of steps in which all decode and nothing else can happen is
committed at once, with the very times that the single steps would have had.
"""

from __future__ import annotations

import random
from array import array
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from heapq import heappop, heappush
from math import ceil

from tiny_llm.data import Advance, Plan, PlanItem, SamplingParams, Sequence
from tiny_llm.engine.trace import Trace
from tiny_llm.errors import CapacityError
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.kv.disk import BlockStore
from tiny_llm.planning.simulation.contiguous import ContiguousBlocks
from tiny_llm.planning.simulation.costs import StepMs
from tiny_llm.planning.simulation.figures import Figures, Sample, Samples
from tiny_llm.planning.simulation.load import Asked
from tiny_llm.planning.simulation.policy import Policy
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import MAX_PRIORITY, SchedulerSettings
from tiny_llm.scheduler.speed import root_of

_STRIDE = 4096  # steps at once, at most
_LEARNT, _SELDOM = 2000, 16  # after so many steps the scheduler's guess is told of one in so many
_ROWS = 160  # of the pool that are looked at for a picture


class SimulatedStore(BlockStore):
    """A disk of names alone, the latest ``most``; or one that has ``everything``, as it was brought there."""

    def __init__(self, most: int, block_ms: float, *, everything: bool = False) -> None:
        self._most, self._block_ms, self._everything = most, block_ms, everything
        self._names: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, content: bytes) -> bool:
        return self._everything or content[:32] in self._names

    def worth_reading(self, computed_ms: float, within_ms: float) -> int:
        """Blocks that can be read in time, where that is sooner than to compute them."""
        if self._block_ms >= computed_ms:
            return 0
        return int(min(1e9, max(1.0, within_ms / self._block_ms))) if self._block_ms else 10**9

    def read(self, content: bytes) -> bytes | None:
        """Something, where it is there."""
        if not self._everything and content[:32] in self._names:
            self._names.move_to_end(content[:32])
        return b"" if content in self else None

    def keep(self, content: bytes) -> None:
        """It has been written."""
        self._names[content[:32]] = None
        if len(self._names) > self._most:
            self._names.popitem(last=False)


class Going:
    """A request in an engine, and when its first and last tokens came (seconds)."""

    __slots__ = ("advance", "asked", "due", "first", "last", "seq", "token")

    def __init__(self, asked: Asked, seq: Sequence) -> None:
        self.asked, self.seq = asked, seq
        self.first = self.last = -1.0
        self.due = -1  # the step that brings its last token
        self.token = array("i", (-2 - seq.id,))  # that it says over and over, and no other does
        self.advance = Advance(seq.id, self.token)


class SimulatedEngine:
    """Takes requests with ``add`` in order of time, and serves them up to a time with ``run_until``.

    ``ended`` is told of each whose last token came.
    """

    def __init__(
        self,
        policy: Policy,
        costs: StepMs,
        figures: Figures,
        ended: Callable[[Going], None],
        *,
        store: SimulatedStore | None = None,
        strides: bool = True,
        seed: int = 0,
    ) -> None:
        self.now = self._decided = 0.0  # until when the next step is known
        self.busy_s = 0.0
        self.steps = 0
        self.trace: Trace | None = None
        self.samples: Samples | None = None
        self.draw_owners = False
        self.store = store
        self._policy, self._costs, self._figures, self._ended = policy, costs, figures, ended
        self._chance = random.Random(seed)
        slots = policy.kv_tokens or costs.kv_tokens
        block_bytes = policy.block_size * costs.kv_token_bytes
        self._swap_ms = block_bytes / (policy.link_gb_s * 1e6)
        self._disk_ms = block_bytes / (policy.disk_gb_s * 1e6)
        self.scheduler = Scheduler(
            self._blocks(slots),
            SchedulerSettings(
                max_num_seqs=min(policy.max_concurrent, policy.chunk_budget),
                max_num_batched_tokens=policy.chunk_budget,
                max_step_ms=policy.max_step_ms,
                max_queued_requests=10**9,
                ageing_s=1e6 if policy.order == "shortest" else policy.ageing_s,
                preemption=policy.preemption,
                swap_ms_per_block=self._swap_ms,
            ),
            costs.guess,
            {"simulated": self._guess} if policy.acceptance else None,
        )
        self._strides = strides and not policy.acceptance
        self._going: dict[int, Going] = {}
        self._decoding = 0  # of those that go on by a token a step
        self._due: list[tuple[int, int]] = []  # (step, sequence): when last tokens come, if nothing happens

    def _blocks(self, slots: int) -> BlockManager:
        policy = self._policy
        if policy.memory != "paged":
            return ContiguousBlocks(slots, policy.memory, policy.reserve, policy.max_model_len)
        if policy.prefix_cache == "disk" and self.store is None:
            self.store = SimulatedStore(policy.disk_tokens // policy.block_size, self._disk_ms)
        size = policy.block_size
        return BlockManager(
            size,
            max(1, slots // size),
            host_blocks=policy.host_tokens // size if policy.preemption != "recompute" else 0,
            prefix_cache=policy.prefix_cache != "off" or self.store is not None,
            store=self.store,
        )

    def __len__(self) -> int:
        """Requests that wait or run."""
        return len(self._going)

    def add(self, number: int, asked: Asked, at: float, first: float = -1.0) -> None:
        """Take request ``number`` in, which comes ``at`` a time not before that of any step that has begun.

        It had its ``first`` token already, if that was at any time. One that can never fit is refused.
        """
        if not self._going:
            self.now = self._decided = max(self.now, at)
        seq = Sequence(
            number,
            _tokens(number, asked),
            _asking(asked.answer),
            self._priority(asked),
            at,
            salt=f"{asked.prompt} {asked.answer}" if self._policy.memory != "paged" else "",
        )
        try:
            self.scheduler.add(seq)
        except CapacityError:
            self._figures.refused += 1
            return
        self._going[number] = going = Going(asked, seq)
        going.first = going.last = first
        if self.trace is not None:
            self.trace.arrived(number, at)

    def _priority(self, asked: Asked) -> int:
        if self._policy.order == "shortest":  # the scheduler's levels, by the length's logarithm
            return MAX_PRIORITY - min(2 * MAX_PRIORITY, 8 * (asked.prompt + asked.answer).bit_length())
        return asked.priority if self._policy.order == "priority" else 0

    def run_until(self, until: float) -> None:
        """Run the steps that are decided before ``until``: one of decodes alone, as the last one begins."""
        while self._going and self._decided < until:
            self._step(until)

    def _step(self, until: float) -> None:
        scheduler = self.scheduler
        plan = scheduler.schedule()
        for number, _ in plan.preempted:
            one = self._going[number]
            if one.due >= 0:
                one.last, one.due = self.now, -1
                self._decoding -= 1
        if not plan.items:
            self.now += self._moves_ms(plan) / 1e3 + 1e-6
            self._decided = self.now
            return
        began = self.now
        rows = plan.decodes + plan.drafted
        ends = sum(item.logit_rows for item in plan.items[plan.decodes :])
        ms = self._moves_ms(plan) + self._costs.ms(
            rows + plan.chunk_tokens, rows + ends, plan.decode_context, plan.chunk_context
        )
        self._pass(ms, 1, min(plan.decodes, self._decoding))
        is_followed = plan.decodes == scheduler.num_running and not self._policy.acceptance
        self._decided = began if is_followed else self.now
        if self.steps < _LEARNT or not self.steps % _SELDOM:
            scheduler.speed.observe(plan, ms)
        more = self._more_steps(plan, until) if self._strides and not plan.chunk_tokens else 0
        if self.trace is not None:
            self.trace.step(plan, began, self.now)
        self._commit(plan, more + 1)
        if self.samples is not None and self.now >= self.samples.due:
            self.samples.add(self._sample())

    def _pass(self, ms: float, steps: int, decodes: int) -> None:
        """Steps of so long each, in which so many got a token that had one before."""
        self.now += steps * ms / 1e3
        self.busy_s += steps * ms / 1e3
        self.steps += steps
        if decodes:
            self._figures.itl.add(ms / 1e3, steps * decodes)

    def _moves_ms(self, plan: Plan) -> float:
        """What blocks take on their way to the host or the disk, and back."""
        if self.store is not None:
            for _, content in plan.save:
                self.store.keep(content)
        disk = (len(plan.save) + len(plan.load)) * self._disk_ms if plan.save or plan.load else 0.0
        return disk + (len(plan.swap_out) + len(plan.swap_in)) * self._swap_ms

    def _more_steps(self, plan: Plan, until: float) -> int:
        """How many steps after ``plan`` will be as it is; the clock passes over them.

        Nobody comes, nobody ends, and there are blocks for all: then whoever waits goes on waiting.
        """
        if plan.decodes != self.scheduler.num_running or plan.decodes != self._decoding:
            return 0
        due, going = self._due, self._going
        while due and ((one := going.get(due[0][1])) is None or one.due != due[0][0]):
            heappop(due)
        assert due, "somebody decodes"
        blocks = self.scheduler.blocks
        most = min(_STRIDE, due[0][0] - self.steps, blocks.available // plan.decodes * blocks.block_size - 1)
        count, context, decodes = 0, plan.decode_context + plan.decodes, plan.decodes
        more = decodes * self._costs.decode_context_ms
        ms = self._costs.ms(decodes, decodes, context, 0)
        # Each step takes longer than the last by as much: those of a hundredth's difference are one sum.
        while count < most and self._decided < until:
            if self.steps < _LEARNT:
                run = 1
                following = Plan([], 0, decodes=decodes, decode_context=context)
                self.scheduler.speed.observe(following, ms)
            else:
                alike = 1 + min(_STRIDE, int(ms / (100 * more + 1e-9 * ms)))
                left = min(max(0.0, until - self.now) * 1e3, _STRIDE * ms)
                run = min(alike, most - count, 1 + ceil(root_of(ms - more / 2, more, left)))
            self._pass(ms + more * (run - 1) / 2, run, decodes)
            context += run * decodes
            ms += run * more
            self._decided = self.now - (ms - more) / 1e3
            count += run
        return count

    def _commit(self, plan: Plan, steps: int) -> None:
        """Give every sequence its tokens, of so many steps; tell of those that have ended."""
        going, items, now = self._going, plan.items, self.now
        ended: list[Going] = []
        one_by_one = self._policy.acceptance > 0 or plan.decodes != self._decoding
        while not one_by_one and self._due and self._due[0][0] <= self.steps:
            step, number = heappop(self._due)
            one = going.get(number)
            if one is not None and one.due == step:
                ended.append(one)
        if steps > 1:
            self._stretch(items, steps)
            advances = [Advance(item[0], going[item[0]].token * steps) for item in items]
        elif one_by_one:
            advances = [self._accept(item, ended) for item in items[: plan.decodes]]
        else:
            advances = [going[item[0]].advance for item in items[: plan.decodes]]
        ends = {one.seq.id for one in ended}
        if ends:
            advances = [a._replace(finish_reason="length") if a.seq_id in ends else a for a in advances]
        for item in items[plan.decodes :]:
            if item.logit_rows:
                advances.append(self._first(going[item.seq_id], ended))
        self.scheduler.commit(plan, advances)
        for one in ended:
            self._decoding -= one.due >= 0
            del going[one.seq.id]
            one.last = now
            self._ended(one)

    def _stretch(self, items: list[PlanItem], steps: int) -> None:
        """Make the items of a plan those of more steps, with the blocks for them."""
        tokens, blocks = array("i", bytes(4 * steps)), self.scheduler.blocks
        for number, (seq, table) in enumerate(self.scheduler.running()):
            start = seq.num_computed_tokens
            if start + steps > table.writable:
                assert blocks.reserve(table, start, start + steps), "they were counted"
            items[number] = PlanItem(seq.id, tokens, start, table.blocks, 1)

    def _first(self, one: Going, ended: list[Going]) -> Advance:
        """A token behind a chunk: a request's first, or the next after it had to make room."""
        if one.first < 0:
            one.first = self.now
        else:
            self._figures.itl.add(self.now - one.last)
        left = one.seq.prompt_len + one.seq.params.max_tokens - len(one.seq.tokens) - 1
        if not left:
            ended.append(one)
            return one.advance._replace(finish_reason="length")
        one.due = self.steps + left
        self._decoding += 1
        if not self._policy.acceptance:
            heappush(self._due, (one.due, one.seq.id))
        return one.advance

    def _accept(self, item: PlanItem, ended: list[Going]) -> Advance:
        """A token, and as many guesses as are right by chance."""
        one, right = self._going[item.seq_id], 0
        if one.due < 0:  # its prompt is of one token, or all but that was there
            return self._first(one, ended)
        while right < len(item.tokens) - 1 and self._chance.random() < self._policy.acceptance:
            right += 1
        left = one.seq.prompt_len + one.seq.params.max_tokens - len(one.seq.tokens)
        tokens = one.token * min(right + 1, left)
        if right + 1 < left:
            return Advance(item.seq_id, tokens)
        ended.append(one)
        return Advance(item.seq_id, tokens, "length")

    def _guess(self, seq: Sequence, most: int) -> array[int]:
        return array("i", (0,)) * most

    def _sample(self) -> Sample:
        scheduler, usage = self.scheduler, self.scheduler.usage()
        size, running = scheduler.blocks.block_size, scheduler.running()
        to_come = sum(
            min(len(table.blocks) * size, seq.prompt_len + seq.params.max_tokens - 1)
            - seq.num_computed_tokens
            for seq, table in running
        )
        to_come = min(usage.wasted_slots, to_come)
        total = scheduler.blocks.max_blocks
        owners = array("i", bytes(4 * min(total, _ROWS) if self.draw_owners else 0))
        for seq, table in running if owners else ():
            for block in table.blocks:
                owners[block * len(owners) // total] = seq.id + 1
        return Sample(
            self.now,
            usage.used * size - usage.wasted_slots,
            to_come,
            usage.wasted_slots - to_come,
            usage.cached * size,
            (total - usage.used - usage.cached) * size,
            len(running),
            scheduler.num_waiting,
            owners,
        )


@lru_cache(maxsize=4096)
def _asking(answer: int) -> SamplingParams:
    """Checked once for each length."""
    return SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)


def _tokens(number: int, asked: Asked) -> array[int]:
    """A prompt: what its names stand for, and then tokens that no other prompt has."""
    tokens = array("i")
    for name in asked.names:
        tokens.extend(array("i", (name,)) * asked.unit)
    own = asked.prompt - len(tokens)
    if own < 0:
        return tokens[: asked.prompt]
    tokens.extend(array("i", (-2 - number,)) * own)
    return tokens
