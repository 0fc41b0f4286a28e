"""Owns what the scheduler notes: a sequence's place with it; a plan in the making, and the room it has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import inf

from tiny_llm.data import Join, Plan, PlanItem, Sequence
from tiny_llm.kv.block_table import BlockTable
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.sampling_params import PoolingParams
from tiny_llm.scheduler.drafts import Acceptance
from tiny_llm.scheduler.queues import Rank
from tiny_llm.scheduler.speed import StepTime, Work

_MARGIN = 0.9  # of a step's time is planned for; the rest is for what the guess does not see
_LEAST_CHUNK = 8  # tokens that get in even where the decodes alone take all the time, if they are not dear


def rank_of(seq: Sequence, ageing_s: float) -> Rank:
    """Smaller goes first: a level of priority makes a request as old as one that came ``ageing_s`` earlier.

    It never changes, so ageing costs nothing: of two that wait, both get older by the same.
    """
    return (seq.arrival - seq.priority * ageing_s, seq.id)


class Place:
    """A sequence's place. ``blocked_at``: the blocks available when last there was no room for it.

    ``held``: all of it is computed, and its next token depends on sequences that are not as far yet.
    ``pooled``: nothing is drawn for it, so no logits are wanted.
    """

    __slots__ = ("acceptance", "answers", "blocked_at", "held", "pooled", "rank", "seq", "table")

    def __init__(self, seq: Sequence, table: BlockTable, ageing_s: float, answers: int) -> None:
        self.seq = seq
        self.table = table
        self.answers = answers  # that are to come of it: several until it forks
        self.rank = rank_of(seq, ageing_s)
        self.blocked_at = -1
        self.held = False
        self.pooled = isinstance(seq.params, PoolingParams)
        self.acceptance = Acceptance()


class StepPlan:
    """A plan in the making, and what is left of its budget: ``tokens`` and ``ms``.

    It may have ``most`` decodes and ``most_items`` in all, and leaves the ``busy`` sequences as they are:
    other plans have them.
    """

    def __init__(self, tokens: int, most: int, most_items: int, beside: Iterable[Plan] = ()) -> None:
        self.most, self.most_items = most, most_items
        self.busy = frozenset(item.seq_id for plan in beside for item in plan.items)
        self.items: list[PlanItem] = []
        self.preempted: list[tuple[int, bool]] = []
        self.joins: list[Join] = []
        self.tokens = tokens
        self.ms = self.bound_ms = inf  # what is left of its time, and all of it
        self.least_ms = inf  # what the first chunk may take whatever is left
        self.decodes = self.decode_context = self.chunk_tokens = self.chunk_context = self.drafted = 0

    @property
    def work(self) -> Work:
        """What is planned so far, as the guess of its time counts it."""
        rows = self.decodes + self.drafted
        return 1.0, rows, self.decode_context, self.chunk_tokens, self.chunk_context

    @property
    def has_room(self) -> bool:
        """Whether a chunk may start. The first one always may, so that prompts move on."""
        has_place = self.tokens > 0 and len(self.items) < self.most_items
        return has_place and (self.ms > 0 or not self.chunk_tokens)

    def limit_time(self, speed: StepTime, most_ms: float) -> None:
        """Leave to chunks what a step of ``most_ms`` has beside the decodes that are planned."""
        alone = speed.decode_ms(self.decodes + self.drafted, self.decode_context)
        self.bound_ms, self.least_ms = _MARGIN * most_ms, max(most_ms, alone) / 2
        self.ms = self.bound_ms - alone

    def tokens_for(self, speed: StepTime, start: int) -> int:
        """How many tokens from position ``start`` on there is room for; of the first chunk always a few."""
        within = speed.tokens_within(self.bound_ms, start, self.work)
        if not self.chunk_tokens and within < _LEAST_CHUNK:
            least = min(_LEAST_CHUNK, speed.tokens_within(self.least_ms, start))
            within = max(within, least, 1)
        return int(min(within, self.tokens))

    def add_chunk(self, item: PlanItem, speed: StepTime) -> None:
        """Put tokens of a sequence that catches up into the step."""
        count = len(item.tokens)
        self.items.append(item)
        self.tokens -= count
        self.ms -= speed.chunk_ms(item.start, count)
        self.chunk_tokens += count
        self.chunk_context += speed.context(item.start, count)

    def finished(self, blocks: BlockManager) -> Plan:
        """The plan, with what moves between ``blocks`` for it."""
        return replace(
            blocks.drain(),
            items=self.items,
            decodes=self.decodes,
            decode_context=self.decode_context,
            chunk_tokens=self.chunk_tokens,
            chunk_context=self.chunk_context,
            preempted=self.preempted,
            drafted=self.drafted,
            joins=self.joins,
        )
