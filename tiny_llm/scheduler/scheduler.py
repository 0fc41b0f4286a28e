"""Owns the queues and the sequences: who takes part in the next step, and with which tokens.

There is one rule. A sequence has ``num_computed_tokens < len(tokens)``, and a step lets
them catch up within a budget. One token behind is a decode: all of those go first, so that no prompt can hold
them up. The rest of the budget goes to chunks of whoever is further behind: new prompts, what a
prefix hit left over, what was preempted. A draft is more tokens in an item of
a decode: guesses, which stay where they turn out to be what is drawn in their places. A sequence whose next
token depends on others (a beam's) is held until they are as far.

Integers only: tokens are passed on and never looked at, no clock is read, and no array is known.
While all decode, a step can be planned before the last one is committed: ``follow``.
Source of the idea: Agrawal et al. 2024, Sarathi-Serve (chunked prefills, stall-free batches).
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import inf

from tiny_llm.data import Advance, Drafter, EndReason, Output, Plan, PlanItem, Sequence, StepCosts
from tiny_llm.errors import BusyError, CapacityError, RequestError
from tiny_llm.kv.block_table import BlockTable
from tiny_llm.kv.blocks import BlockManager, Usage
from tiny_llm.scheduler.pins import Pins
from tiny_llm.scheduler.places import Place, StepPlan
from tiny_llm.scheduler.queues import Rank, RankedList, RankedQueue
from tiny_llm.scheduler.settings import MAX_PRIORITY, SchedulerSettings
from tiny_llm.scheduler.speculation import Speculation
from tiny_llm.scheduler.speed import UNKNOWN_MODEL, StepTime

_BEHIND_ALL: Rank = (inf, 0)
_MOST_ROWS = 128  # of logits in a step, for a prompt whose own log-probabilities are wanted
_item = partial(tuple.__new__, PlanItem)  # in half the time: a step makes one for each sequence


class Scheduler:
    """Decides step by step: ``expire``, ``schedule``, run the plan, ``commit``. For one thread.

    ``costs`` say how the parts of the model's steps compare, before any is measured; ``speed.observe`` is
    to be told how long steps took. ``preempted`` counts by policy. What ``drafters`` guess, by source, is
    checked as far as that pays.
    """

    def __init__(
        self,
        blocks: BlockManager,
        settings: SchedulerSettings | None = None,
        costs: StepCosts | None = None,
        drafters: Mapping[str, Drafter] | None = None,
    ) -> None:
        self.blocks = blocks
        self.pins = Pins(blocks)
        self.settings = settings or SchedulerSettings()
        self.speed = StepTime(costs or UNKNOWN_MODEL)
        self.preempted = {"recompute": 0, "swap": 0}
        self.speculation = Speculation(drafters) if drafters else None
        self._ahead = self.settings.max_num_batched_tokens  # tokens that room is made for at a time
        self._entries: dict[int, Place] = {}
        self._answers = 0  # that these are to give
        self._running: RankedList[Place] = RankedList()
        self._waiting: RankedQueue[Place] = RankedQueue()
        self._deadlines: RankedQueue[Place] = RankedQueue()
        self._patience: RankedQueue[Place] = RankedQueue()  # of those that have not run yet

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks and take part in steps."""
        return len(self._running.items)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their first step, or after preemption for their next."""
        return len(self._entries) - len(self._running.items)

    def sequence(self, seq_id: int) -> Sequence | None:
        """The sequence; None once it has ended."""
        entry = self._entries.get(seq_id)
        return entry.seq if entry else None

    def add(self, seq: Sequence) -> None:
        """Take a new sequence in.

        Raises CapacityError if it can never fit, BusyError if too many wait, RequestError for a
        priority out of range.
        """
        table = self.blocks.table(seq.salt, is_kept=seq.is_kept, keeps_all=bool(seq.parts or seq.pin))
        self._check(seq, table)
        entry = Place(seq, table, self.settings.ageing_s, seq.params.n)
        self._enter(entry)
        self._patience.push((seq.arrival + self.settings.max_wait_s, seq.id), entry)
        self._wait(entry)

    def cancel(self, seq_id: int, reason: EndReason = "cancelled") -> Output | None:
        """End a sequence now and free its blocks; None if it has ended already."""
        entry = self._entries.get(seq_id)
        return self._end(entry, reason) if entry else None

    def expire(self, now: float) -> list[Output]:
        """End the sequences whose deadline has come, or whose first step has not come in time."""
        outputs = []
        for queue in (self._deadlines, self._patience):
            while (first := queue.first()) and first[0][0] <= now:
                outputs.append(self._end(first[1], "timeout"))
        return outputs

    def refuse(self) -> list[Output]:
        """While nobody runs, end those at the head of the queue that all blocks there may be would not hold.

        The pool's limit has fallen since they came: nothing that could still happen would let them start.
        """
        outputs: list[Output] = []
        while not self.num_running and (first := self._waiting.first()):
            entry = first[1]
            would_fit = self.blocks.would_fit(entry.table, entry.seq.tokens, self._ahead)
            if would_fit and self.pins.are_there(entry.seq):
                break
            outputs.append(self._end(entry, "error"))
        return outputs

    def recede(self, most: int) -> Plan:
        """Those last in rank give way, until a pool of ``most`` blocks would do or nobody runs."""
        step = StepPlan(0, 0, 0)
        while self.num_running and self.blocks.capacity_within(0) > most:
            self._give_way(self._running.items[-1], step)
        return step.finished(self.blocks)

    def schedule(self, beside: Collection[Plan] = (), groups: int = 1) -> Plan:
        """The next step. It has no items only if there is nothing to do.

        ``beside`` are plans that are not committed yet: none of their sequences is in this one, nor makes
        room for it. So several steps may be under way; of those that go on or begin, each has one part of
        ``groups``.
        """
        all_of_them = min(len(self), self.settings.max_num_seqs)
        parts = -(-self.num_running // groups), -(-all_of_them // groups)
        step = StepPlan(self.settings.max_num_batched_tokens, *parts, beside)
        behind = self._decode(step)
        for entry in behind:
            self._admit(step, entry.rank)
            self._chunk(step, entry)
        self._admit(step, _BEHIND_ALL)
        while not step.items and not step.busy and self.num_running:  # all are held: room for whom they await
            self._give_way(self._running.items[-1], step)
            self._admit(step, _BEHIND_ALL)
        return step.finished(self.blocks)

    def follow(self, plan: Plan, leaving: Collection[int]) -> Plan | None:
        """The step after ``plan``, before that is committed; None where it cannot be told yet.

        Every sequence of ``plan`` goes on with the token that it is drawing now, but for those ``leaving``.
        One that turns out to have ended is passed over by ``commit``. Where guesses of what comes behind that
        token are worth more, it is waited for.
        """
        if plan.decodes != self.num_running or plan.chunk_tokens or plan.drafted or self._may_admit():
            return None
        speculation = self.speculation
        if speculation is not None and speculation.is_expected(plan, self._entries, self.speed):
            return None
        going_on = [(row, item) for row, item in enumerate(plan.items) if item.seq_id not in leaving]
        ends = [(self._entries[item.seq_id].table, item.start + 1) for _, item in going_on]
        growing = [(table, end) for table, end in ends if end >= table.writable]
        if not going_on or len(growing) > self.blocks.available:
            return None  # with nothing reserved: what is to be copied must not be left for another plan
        for table, start in growing:
            assert self.blocks.reserve(table, start, start + 1), "one token takes one block at most"
        items, context = [], 0
        for row, item in going_on:
            start, being_drawn = item.start + 1, array("i", (-1 - row,))
            blocks = self._blocks(self._entries[item.seq_id], start + 1)
            items.append(PlanItem(item.seq_id, being_drawn, start, blocks, 1))
            context += self.speed.context(start, 1)
        return replace(self.blocks.drain(), items=items, decodes=len(items), decode_context=context)

    def commit(
        self, plan: Plan, advances: Iterable[Advance], of_held: Iterable[Advance] = ()
    ) -> list[Sequence]:
        """Take in what a step brought: an advance for each item with logit rows, in their order.

        One without a token and an end holds its sequence. ``of_held`` lets held sequences go on, since this
        step or an earlier one. Returns the sequences that advanced, each followed by its forks. An item whose
        sequence has ended in the meantime is passed over.
        """
        advanced: list[Sequence] = []
        entries, speculation, remaining = self._entries, self.speculation, iter(advances)
        for seq_id, given, start, _, logit_rows in plan.items:
            advance = next(remaining) if logit_rows else None
            entry = entries.get(seq_id)
            if entry is None:
                continue
            seq, table, end = entry.seq, entry.table, start + len(given)
            drafted = end - len(seq.tokens)
            seq.num_computed_tokens = end
            if advance is not None:
                assert advance.seq_id == seq_id
                if speculation is not None:
                    speculation.count(entry.acceptance, drafted, advance)
                entry.held = drafted == 0 and not advance.tokens
                advanced.append(seq)
                if advance.forks:
                    advanced += self._fork(entry, advance.forks)
                seq.tokens.extend(advance.tokens)
            if drafted > 0:  # what was rejected of it is not kept
                seq.num_computed_tokens = end = min(end, len(seq.tokens) - 1)
            if end >= table.full_at:
                self.blocks.register(table, seq.tokens, end)
            if table.window:
                self.blocks.leave_behind(table, end)
            if advance is not None and advance.finish_reason:
                self._end(entry, advance.finish_reason)
        return [*advanced, *self._released(of_held)] if of_held else advanced

    def abandon(self, plan: Plan) -> list[Output]:
        """The step failed and the pool's arrays are lost: its sequences end, the others start over."""
        failed = [self.cancel(item.seq_id, "error") for item in plan.items]
        for entry in self._entries.values():
            self.blocks.free(entry.table)
            entry.seq.num_computed_tokens = 0
        for entry in list(self._running.items):
            self._running.remove(entry.rank)
            self._wait(entry)
        self.pins.clear()
        self.blocks.clear()
        return [output for output in failed if output]

    def tables(self) -> list[BlockTable]:
        """All that hold blocks, pinned ones too."""
        return [*(entry.table for entry in self._entries.values()), *self.pins.tables]

    def usage(self) -> Usage:
        """The pool's accounts. Looks at every running sequence: for a display, not for a step."""
        held = ((entry.table, entry.seq.num_computed_tokens) for entry in self._running.items)
        return self.blocks.usage(held, self.pins.used_blocks)

    def running(self) -> list[tuple[Sequence, BlockTable]]:
        """Who takes part in steps, by rank, and its blocks: to be looked at, and only between two steps."""
        return [(entry.seq, entry.table) for entry in self._running.items]

    def waiting(self, most: int) -> list[Sequence]:
        """The first ``most`` of those that wait. Looks at all of them: for a display, not for a step."""
        return [entry.seq for entry in self._waiting.head(most)]

    def check_integrity(self) -> None:
        """Assert that nothing is lost or held twice. Looks at everything."""
        self.blocks.check_integrity(self.tables())
        parked = sum(entry.held for entry in self._entries.values() if entry.seq.status == "waiting")
        assert self.num_waiting == len(self._waiting) + parked
        assert self._answers == sum(entry.answers for entry in self._entries.values())
        assert all(
            (entry.seq.status == "running") == bool(entry.table.blocks) for entry in self._entries.values()
        )

    def _check(self, seq: Sequence, table: BlockTable) -> None:
        assert seq.id not in self._entries and seq.tokens and not seq.num_computed_tokens
        if abs(seq.priority) > MAX_PRIORITY:
            what = f"priority is {seq.priority}, but must be from -{MAX_PRIORITY} to {MAX_PRIORITY}."
            raise RequestError(what, param="priority")
        answer = seq.params.max_tokens  # of which the last token is not computed
        needed = self.blocks.most_blocks(table, seq.prompt_len + answer - 1, self._ahead)
        if needed > self.blocks.allowed_blocks:
            raise CapacityError(
                f"The request needs {needed} blocks of {self.blocks.block_size} tokens (prompt "
                f"{seq.prompt_len}, answer up to {answer}), but there are {self.blocks.allowed_blocks}: "
                "shorten the prompt, lower max_tokens, or give more memory with --kv-memory."
            )
        if self._is_queue_full():
            raise BusyError(
                f"{self.num_running} answers are being made and {self.num_waiting} wait, which is the most; "
                "try again later."
            )

    def _is_queue_full(self) -> bool:
        """Whether as many wait as may. Those that could run at once do not, if there is memory for them."""
        limits, first = self.settings, self._waiting.first()
        no_memory = first is not None and self.blocks.available <= first[1].blocked_at
        could_run = self.num_running if no_memory else limits.max_num_seqs
        return self._answers >= could_run + limits.max_queued_requests

    def _decode(self, step: StepPlan) -> list[Place]:
        """Put all that are one token behind into the step; return those that are further behind."""
        items, behind, context = step.items, list[Place](), 0
        size, ahead, windows, busy = self.blocks.block_size, self._ahead, self.speed.windows, step.busy
        for entry in self._running.items:  # _make_room takes from the end, never what is planned already
            seq, table, start = entry.seq, entry.table, entry.seq.num_computed_tokens
            total = len(seq.tokens)
            if entry.held or seq.id in busy or (start == total - 1 and len(items) == step.most):
                continue
            end = total if total - start <= ahead else start + ahead
            if end > table.writable and not self._make_room(entry, end, step):
                break
            if total - start > 1 or entry.pooled:
                behind.append(entry)
            else:
                blocks = table.blocks[: -(-total // size)]
                items.append(_item((seq.id, seq.tokens[start:], start, blocks, 1)))
                context += self.speed.context(start, 1) if windows else start
        if items:
            step.decodes, step.decode_context = len(items), context
            step.tokens -= len(items)
            if self.speculation is not None:
                self.speculation.extend(step, self._entries, self.speed, self.blocks)
            if behind or self.num_waiting:
                step.limit_time(self.speed, self.settings.max_step_ms)
        return behind

    def _chunk(self, step: StepPlan, entry: Place) -> None:
        """Let a sequence catch up as far as the budget goes."""
        if not step.has_room:
            return
        if self.blocks.store is not None:
            self._load(entry, step.ms)
        reach = min(self.pins.join(entry.seq, entry.table, step.joins), entry.table.writable)
        seq, start = entry.seq, entry.seq.num_computed_tokens
        wanted = reach - start
        # Once it has answered, its prompt's rows are known: it catches up like any other.
        scored = seq.params.prompt_logprobs is not None and len(seq.tokens) == seq.prompt_len
        count = min(wanted, step.tokens_for(self.speed, start), _MOST_ROWS if scored else wanted)
        if count:
            end = start + count
            rows = count if scored else int(end == len(seq.tokens) and not entry.pooled)
            item = PlanItem(seq.id, seq.tokens[start:end], start, self._blocks(entry, end), rows)
            step.add_chunk(item, self.speed)
        if count < wanted or scored:  # what may be left of the time is a crumb; rows take memory
            step.tokens = 0

    def _load(self, entry: Place, ms: float) -> None:
        """Take what a sequence lacks from disk, as far as that is there and sooner than computed."""
        seq, start = entry.seq, entry.seq.num_computed_tokens
        computed_ms = self.speed.chunk_ms(start, self.blocks.block_size)
        seq.num_computed_tokens = self.blocks.load(entry.table, seq.tokens, start, computed_ms, ms / 2)
        if len(seq.tokens) == seq.prompt_len:
            seq.cached_tokens += seq.num_computed_tokens - start

    def _admit(self, step: StepPlan, before: Rank) -> None:
        """Start those that wait and rank before ``before``, in order: no one is overtaken for its size."""
        while step.has_room and self.num_running < self.settings.max_num_seqs:
            first = self._waiting.first()
            if first is None or first[0] > before or not self._start(first[1]):
                return
            self._chunk(step, first[1])

    def _may_admit(self) -> bool:
        """Whether the first of those that wait might start now: there is a place, and perhaps the memory."""
        first = self._waiting.first()
        if first is None or self.num_running >= self.settings.max_num_seqs:
            return False
        return self.blocks.available > first[1].blocked_at

    def _start(self, entry: Place) -> bool:
        """Give a waiting sequence its blocks, if there are enough."""
        seq, available = entry.seq, self.blocks.available
        if (available <= entry.blocked_at and self.num_running) or not self.pins.are_there(seq):
            return False  # alone it needs no block to spare
        # A block is left for each that runs, so that it does not throw this one out at once.
        known = self.blocks.allocate(entry.table, seq.tokens, spare=self.num_running, ahead=self._ahead)
        if known is None:
            entry.blocked_at = available
            return False
        seq.num_computed_tokens = known
        seq.status = "running"
        self._waiting.discard(entry)
        self._running.add(entry.rank, entry)
        if self._patience.discard(entry):
            seq.cached_tokens = self.pins.spared(seq, known)
            self.blocks.count(known, len(seq.tokens) - known)
        return True

    def _blocks(self, entry: Place, end: int) -> array[int]:
        """The blocks of a sequence's first ``end`` tokens, as a plan has them: a copy that stays as it is."""
        return entry.table.blocks[: -(-end // self.blocks.block_size)]

    def _make_room(self, entry: Place, end: int, step: StepPlan) -> bool:
        """Give a running sequence blocks up to ``end``. False: it was the last in rank and had to go."""
        while not self.blocks.reserve(entry.table, entry.seq.num_computed_tokens, end):
            last = next(one for one in reversed(self._running.items) if one.seq.id not in step.busy)
            self._give_way(last, step)
            if last is entry:
                return False
        return True

    def _give_way(self, entry: Place, step: StepPlan) -> None:
        """Take a running sequence's blocks; it goes on later, from the host or from its tokens."""
        seq = entry.seq
        swapped = self._is_swap_better(seq.num_computed_tokens) and self.blocks.swap_out(
            entry.table, seq.num_computed_tokens
        )
        if not swapped:
            self.blocks.free(entry.table, seq.tokens, seq.num_computed_tokens)
            seq.num_computed_tokens = 0
        self.preempted["swap" if swapped else "recompute"] += 1
        step.preempted.append((seq.id, swapped))
        self._running.remove(entry.rank)
        seq.status = "waiting"
        if not entry.held:  # else it is in no queue until it may go on
            self._wait(entry)

    def _is_swap_better(self, computed: int) -> bool:
        if self.settings.preemption != "auto":
            return self.settings.preemption == "swap"
        each = self.settings.swap_ms_per_block
        if each is None:
            return False
        swap_ms = self.blocks.blocks_for(computed) * each
        return swap_ms < self.speed.chunk_ms(0, computed)

    def _released(self, of_held: Iterable[Advance]) -> list[Sequence]:
        """Let held sequences go on; return them, each followed by its forks."""
        advanced: list[Sequence] = []
        for advance in of_held:
            entry = self._entries[advance.seq_id]
            forks = self._fork(entry, advance.forks) if advance.forks else ()
            entry.seq.tokens.extend(advance.tokens)
            advanced += (entry.seq, *forks)
            if entry.held and entry.seq.status == "waiting":
                self._wait(entry)
            entry.held = False
        return advanced

    def _fork(self, entry: Place, forks: Iterable[Advance]) -> list[Sequence]:
        """Start a sequence for each fork, with all that ``entry`` holds and the fork's own tokens."""
        seq, children = entry.seq, list[Sequence]()
        self._answers -= entry.answers - 1
        entry.answers = 1
        for fork in forks:
            branch = self._branch(entry, fork)
            child, table = branch.seq, branch.table
            children.append(child)
            self._enter(branch)
            has_place = self.num_running < self.settings.max_num_seqs or fork.finish_reason
            if seq.status == "running" and has_place:
                self._running.add(branch.rank, branch)
            else:  # it waits like any other, and finds most of what it needs in the prefix cache
                self.blocks.free(table, child.tokens, child.num_computed_tokens)
                child.num_computed_tokens = 0
                self._wait(branch)
            if fork.finish_reason:
                self._end(branch, fork.finish_reason)
        return children

    def _branch(self, entry: Place, fork: Advance) -> Place:
        """A place for a fork's sequence: ``entry``'s tokens and the fork's own, in the same blocks."""
        assert fork.seq_id not in self._entries
        child = replace(entry.seq, id=fork.seq_id, tokens=entry.seq.tokens[:], cached_tokens=0)
        child.tokens.extend(fork.tokens)
        table = self.blocks.fork(entry.table, child.num_computed_tokens)
        return Place(child, table, self.settings.ageing_s, answers=1)

    def _enter(self, entry: Place) -> None:
        self._entries[entry.seq.id] = entry
        self._answers += entry.answers
        if entry.seq.deadline < inf:
            self._deadlines.push((entry.seq.deadline, entry.seq.id), entry)

    def _wait(self, entry: Place) -> None:
        entry.seq.status = "waiting"
        entry.held = False
        entry.blocked_at = -1
        self._waiting.push(entry.rank, entry)

    def _end(self, entry: Place, reason: EndReason) -> Output:
        """Let a sequence go, wherever it is, and free its blocks."""
        seq = entry.seq
        if seq.status == "running":
            self._running.remove(entry.rank)
        self._waiting.discard(entry)
        self._deadlines.discard(entry)
        self._patience.discard(entry)
        self.pins.keep(seq, entry.table)
        self.blocks.free(entry.table, seq.tokens, seq.num_computed_tokens)
        del self._entries[seq.id]
        self._answers -= entry.answers
        seq.status = "finished"
        seq.finish_reason = reason
        return Output(seq.id, reason)
