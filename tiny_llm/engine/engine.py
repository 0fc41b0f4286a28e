"""Owns the step loop: requests in, chunks out, many at a time. Chapter 2.9.

One step: the scheduler plans, the runner makes logits of the plan, each row gets a token, text is made
of it, the scheduler commits. All of it on one thread, the caller's. While a step runs, the next one may
be prepared, if it is known but for its tokens. A fault in one request ends that request; a fault of
the step ends those in it, and the engine goes on. Knows no HTTP and no terminal.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from math import inf

import mlx.core as mx

from tiny_llm.data import Plan
from tiny_llm.data import Sequence as TokenSequence
from tiny_llm.decoding.decide import Decision
from tiny_llm.engine.budget import NO_MEMORY, PoolLimit
from tiny_llm.engine.contexts import Context, Contexts, JoinedPrompt, Joining, NewContext
from tiny_llm.engine.draft import DraftModel, drafters_of
from tiny_llm.engine.open_requests import Event, OpenRequests
from tiny_llm.engine.ranks import Lead
from tiny_llm.engine.runner import InFlightBatch, Runner
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.engine.stats import EngineStats, Snapshot, StepClock
from tiny_llm.engine.trace import Trace
from tiny_llm.errors import ContextError, RequestError
from tiny_llm.kv.disk import BlockStore
from tiny_llm.kv.paged import PagedCache
from tiny_llm.memory import (
    give_back_memory,
    held_memory_bytes,
    limit_kept_memory,
    narrowest_limit,
    wire_memory,
)
from tiny_llm.metrics import fallbacks
from tiny_llm.models.cost import step_costs
from tiny_llm.models.footprint import activation_bytes
from tiny_llm.models.loading import weight_bytes
from tiny_llm.models.registry import Model
from tiny_llm.models.replay import played
from tiny_llm.ops.backend import kernel_seconds, use
from tiny_llm.ops.kv_pool import KvFormat, may_run_ahead
from tiny_llm.proving.choice import Kernels
from tiny_llm.sampling_params import PoolingParams, SamplingParams
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.tokenizer.tokenizer import Tokenizer

_KEPT_AT_ONCE = 64  # blocks
_COMPUTED = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)  # of a context: its tokens


class Engine:
    """Serves requests on one model. ``healthy`` is whether the last step worked."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        settings: EngineSettings,
        *,
        kernels: Kernels,
        kv_dtype: mx.Dtype,
        end_ids: Collection[int],
        max_context: int,
        draft: Model | None = None,
        store: BlockStore | None = None,
        lead: Lead | None = None,
    ) -> None:
        self.healthy = True
        self.totals = EngineStats()
        self.trace: Trace | None = None  # give it one, and it is written to
        self._max_context = max_context
        self._clock = time.perf_counter
        self._store = store
        self._ahead: list[InFlightBatch] = []
        used = (model, draft) if settings.speculate == "draft" else (model,)
        with use(kernels.backend, kernels.ours):
            models = [one if lead else played(one) for one in used if one is not None]
            formats = [KvFormat.of(one.config, settings.block_size, kv_dtype) for one in models]
            ahead = settings.async_scheduling and may_run_ahead(mx.default_device().type)
        self.block_bytes = sum(format.block_bytes for format in formats)
        speculate = settings.speculate or ("ngram" if kernels.same_tokens else "off")
        # No more than there can ever be: the addresses of all blocks are taken at once.
        most = min(settings.kv_blocks, max(1, narrowest_limit().most // self.block_bytes))
        settings = replace(settings, kv_blocks=most, async_scheduling=ahead, speculate=speculate)
        self.settings = settings
        slab = settings.slab_blocks
        if settings.share is not None:
            most = slab * settings.share.open(slab * self.block_bytes)
        room = {"max_blocks": most, "host_blocks": settings.host_blocks}
        caches = [PagedCache(format, **room) for format in formats]
        drafting = DraftModel(models[-1], caches[-1]) if len(models) > 1 else None
        self.runner = Runner(models[0], caches[0], kernels, drafting, lead)
        scheduler = settings.scheduler
        if settings.host_blocks and scheduler.swap_ms_per_block is None:
            scheduler = replace(scheduler, swap_ms_per_block=self.runner.swap_ms())
        costs = step_costs(model.config, weight_bytes(model), formats[0].token_bytes)
        assert speculate != "draft" or drafting, "somebody must guess"
        blocks, drafters = settings.block_manager(store, *models), drafters_of(speculate)
        self.scheduler = Scheduler(blocks, scheduler, costs, drafters)
        self.contexts = Contexts(
            self.scheduler, self.block_bytes, self._clock, can_turn=self.runner.inv_freq is not None
        )
        self._open = OpenRequests(self.scheduler, self.contexts, self.totals, tokenizer, end_ids)
        largest = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        step_bytes = activation_bytes(model.config, *largest, formats[0].gathered_bytes(max_context))
        self._pool_limit = PoolLimit(most, slab, self.block_bytes, step_bytes, self._clock, settings.share)
        limit_kept_memory()
        wire_memory()

    def __len__(self) -> int:
        """Requests that are waiting or running."""
        return len(self._open)

    @property
    def cache(self) -> PagedCache:
        """The pages of keys and values."""
        return self.runner.cache

    def add(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        salt: str = "",
        keep: bool = True,
        arrival_s: float | None = None,
        joining: Joining | None = None,
        context: NewContext | None = None,
    ) -> int:
        """Take a request in and return its id; the prompt fits the context. Without a seed it draws one.

        With ``keep`` false nothing of it goes to the store. ``arrival_s``: when it came, by the engine's
        clock, if that was before now. ``joining`` says which contexts stand before the prompt, ``context``
        as what it is to be kept.

        Raises CapacityError if it can never fit the KV memory, ContextError if with its contexts it is too
        long, BusyError if too many wait, RequestError for a priority out of range.
        """
        now = self._clock() if arrival_s is None else arrival_s
        if context is not None:
            return self._pin(self.contexts.add(context, prompt, salt, now))
        joined = self.contexts.joined(prompt, joining, salt)
        if len(joined.token_ids) > len(prompt):  # whoever asked may not know how long contexts are
            room = self.settings.kv_blocks * self.settings.block_size - len(joined.token_ids)
            params = replace(params, max_tokens=max(1, min(params.max_tokens, room)))
        try:
            due = inf if timeout_s is None else now + timeout_s
            return self._add(joined, params, priority, now, due, keep)
        except Exception:
            self.contexts.leave(joined.contexts)
            raise

    def _pin(self, context: Context) -> int:
        """Compute a context, or find it: a request of one token, whose prompt is kept."""
        pin = context.number, len(context.token_ids)
        prompt = JoinedPrompt(context.token_ids[:], (), pin, context.salt, ())  # its answer is added
        try:
            return self._add(prompt, _COMPUTED, 0, context.created_s, inf, keep=True)
        except Exception:
            self.contexts.settle(context.number)
            raise

    def _add(
        self, prompt: JoinedPrompt, params: SamplingParams, priority: int, now: float, due: float, keep: bool
    ) -> int:
        salt, tokens = prompt.salt, prompt.token_ids
        room = self._max_context - len(tokens) + isinstance(params, PoolingParams)
        if room <= 0:
            raise ContextError(
                f"With its contexts the prompt is too long: it has {len(tokens)} tokens, and this model's "
                f"maximum context length is {self._max_context} tokens, the answer included."
            )
        seed = secrets.randbits(64) if params.seed is None else params.seed
        own = replace(params, max_tokens=min(params.max_tokens, room), seed=seed)
        number = self._open.number()
        if params.reads_prompt:
            if prompt.parts:
                raise RequestError("prompt_logprobs: independent contexts have none; join them exactly.")
            salt, keep = f"{salt}/{number}", False
        sequence = TokenSequence(
            number, tokens, own, priority, now, due, salt, keep, prompt.parts, prompt.pin
        )
        self._open.add(sequence, prompt.contexts)
        if self.trace is not None:
            self.trace.arrived(number, now)
        return number

    def stats(self) -> Snapshot:
        """All figures of the moment, for whoever reports them. To be called between two steps."""
        scheduler, kernels = self.scheduler, self.runner.kernels
        prefix, speculation = scheduler.blocks.prefix, scheduler.speculation
        return Snapshot(
            healthy=self.healthy,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            blocks=scheduler.usage(),
            block_bytes=self.block_bytes,
            prefix_hit_tokens=prefix.hit_tokens if prefix is not None else 0,
            prefix_miss_tokens=prefix.miss_tokens if prefix is not None else 0,
            preempted=dict(scheduler.preempted),
            drafted_tokens=dict(speculation.drafted) if speculation is not None else {},
            accepted_tokens=dict(speculation.accepted) if speculation is not None else {},
            totals=self.totals,
            fallbacks=fallbacks().read(),
            kernel_s=kernel_seconds(),
            ops_on_ours=kernels.on_ours,
            same_tokens=kernels.same_tokens,
            memory_bytes=held_memory_bytes(),
            disk=None if self._store is None else self._store.usage,
        )

    def cancel(self, request_id: int) -> list[Event]:
        """End a request now; its blocks are free when this returns. Nothing if it has ended."""
        ended = [self.scheduler.cancel(answer.seq_id) for answer in self._open.answers(request_id)]
        return self._open.ended(ended, self._clock())

    def rest(self) -> None:
        """Nobody has asked for a while: give the pool's memory back, and what it remembers with it."""
        assert not self._open, "requests are waiting or running"
        self.runner.settle(self._ahead)
        self._shrink_pool(0, wait=True)
        give_back_memory()

    def give_back(self) -> None:
        """Let other models have what they ask for of the pool, where no step is under way."""
        blocks = self.scheduler.blocks
        asked = None if self._ahead else self._pool_limit.asked(blocks)
        if asked is not None:
            used, most = asked
            self.runner.move(self.scheduler.recede(used))
            self._shrink_pool(most)
        self._pool_limit.note(blocks)

    def close(self) -> None:
        """Let go of keys and values; nothing can be asked any more."""
        self.runner.let_go()
        self._pool_limit.close()

    def keep_cached(self, first: int = 0, *, wait: bool = True) -> None:
        """Let the store have what the prefix cache holds from block ``first`` on, before that is lost."""
        unsaved = self.scheduler.blocks.unsaved(first)
        for start in range(0, len(unsaved), _KEPT_AT_ONCE):
            self.cache.save(unsaved[start : start + _KEPT_AT_ONCE])
            self._write_saved(wait=wait)

    def _write_saved(self, *, wait: bool = False) -> None:
        for content, data in self.cache.saved():
            assert self._store is not None, "nothing is saved without one"
            self._store.write(content, data, wait=wait)

    def step(self) -> list[Event]:
        """Run one step and return what came of it; nothing to do is no step."""
        now = self._clock()
        events = self._open.ended(self.scheduler.expire(now), now)
        self.give_back()
        events += self._limit_pool() + self._look_after_contexts()
        clock = StepClock(self.totals, self._clock)
        was_ahead = bool(self._ahead)
        batch = self._ahead.pop(0) if was_ahead else self._launch_next(clock)
        if batch is None:
            return events
        try:
            self._launch_ahead(batch, clock)
            decisions = batch.decisions(clock.lap)
        except Exception as error:  # whatever it was, those who are not in this step must not pay for it
            return events + self._failed(batch.plan, error)
        # The first of several that run ahead has a part of the next one in its time, the last one too little.
        is_whole = was_ahead == bool(self._ahead) and batch.is_usual
        self._write_saved()
        events += self._commit(batch, decisions)
        clock.lap("commit")
        self._count(batch.plan, clock, is_whole)
        self._pool_limit.note(self.scheduler.blocks)
        return events

    def _limit_pool(self) -> list[Event]:
        """Fit the pool to the memory that is there; end those for whom that is too little even alone."""
        blocks, ask = self.scheduler.blocks, self._pool_limit.blocks
        blocks.set_limit(ask(blocks.capacity))
        if blocks.capacity_within(blocks.limit) < blocks.capacity and not self._ahead:
            blocks.set_limit(ask(blocks.capacity, again=True))  # now that no step takes memory
            self._shrink_pool(blocks.limit)
            blocks.set_limit(ask(blocks.capacity))
        what = NO_MEMORY.format(blocks.max_blocks, blocks.block_size)
        return self._open.ended(self.scheduler.refuse(), self._clock(), what)

    def _shrink_pool(self, limit: int, *, wait: bool = False) -> None:
        blocks = self.scheduler.blocks
        self.keep_cached(blocks.capacity_within(limit), wait=wait)
        blocks.shrink(self.scheduler.tables(), limit)
        self.runner.move(blocks.drain())
        self._pool_limit.note(blocks)

    def _launch_next(self, clock: StepClock, *beside: InFlightBatch) -> InFlightBatch | None:
        """Start the step that the scheduler plans, ``beside`` others; None if there is nothing to do."""
        with self._pool_limit.planning(self.scheduler):
            plan = self.scheduler.schedule([batch.plan for batch in beside], self.runner.groups)
        for item in plan.items:
            request = self._open.of(item.seq_id)
            if not request.started_s:
                sequence = self.scheduler.sequence(item.seq_id)
                assert sequence is not None, "it is in the plan"
                request.started_s, request.cached_tokens = self._clock(), sequence.cached_tokens
                self.totals.queue_s.add(request.started_s - request.arrival)
        clock.lap("schedule")
        if plan.items or (beside and plan.preempted):  # what moves, moves in its turn
            return self.runner.launch(plan, self._open.drawing, None, clock.lap)
        if plan.preempted:  # all had to go, some of them to the host
            self.runner.move(plan)
        return None

    def _launch_ahead(self, batch: InFlightBatch, clock: StepClock) -> None:
        """Start the step after one under way, if it is known but for the tokens that are being drawn. Where
        ranks work in turns, start as many others beside it as there are turns.
        """
        plan, rows, blocks = batch.plan, batch.rows, self.scheduler.blocks
        is_too_large = blocks.capacity_within(blocks.limit) < blocks.capacity
        shrinks = is_too_large or self._pool_limit.asked(blocks) is not None  # when no step is under way
        while len(self._ahead) < self.runner.groups - 1 and not shrinks:
            other = self._launch_next(clock, batch, *self._ahead)
            if other is None:
                return
            self._ahead.append(other)
        one_each = len(rows) == len(plan.items)  # else several answers begin from one prompt, or it goes on
        may = self.settings.async_scheduling and one_each and not shrinks
        if batch.drawing is None or not may or any(row.answer.needs_last_token for row in rows):
            return
        leaving = {row.answer.seq_id for row in rows if row.position == row.answer.last_position}
        with self._pool_limit.planning(self.scheduler):
            following = self.scheduler.follow(plan, leaving)
        clock.lap("schedule")
        if following is not None:
            drawn = batch.drawing.tokens
            self._ahead.append(self.runner.launch(following, self._open.drawing, drawn, clock.lap))

    def _commit(self, batch: InFlightBatch, decisions: Sequence[Decision]) -> list[Event]:
        """Give each answer its token, and the scheduler what comes of it; forget what has ended."""
        self.healthy = True
        now = self._clock()
        events = self._open.commit(batch.plan, decisions, now)
        if not len(self.scheduler):
            self.runner.settle(self._ahead)  # all of their sequences have ended
        return events + self._open.embedded(batch.pooled, now)

    def _look_after_contexts(self) -> list[Event]:
        """Those whose time is up go; who waits for one that could not be computed ends."""
        self.contexts.expire()
        events: list[Event] = []
        while self.contexts.broken:
            context = self.contexts.broken.pop()
            ended = [self.scheduler.cancel(one.seq_id, "error") for one in self._open.users(context)]
            what = f"The context {context.name!r} could not be computed."
            events += self._open.ended(ended, self._clock(), what)
        return events

    def _count(self, plan: Plan, clock: StepClock, is_whole: bool) -> None:
        """Tell those who keep figures how long a step took; a guess is learnt from whole ones only."""
        ms = clock.done(plan)
        if is_whole:
            self.scheduler.speed.observe(plan, ms)
        if self.trace is not None:
            now = self._clock()
            self.trace.step(plan, now - ms / 1e3, now)
            if plan.drafted and self.scheduler.speculation is not None:
                self.trace.guesses(now, self.scheduler.speculation)

    def _failed(self, plan: Plan, error: Exception) -> list[Event]:
        """The step broke: its requests end with the error, the pool is made anew, the others start over."""
        self.healthy, self._ahead = False, []
        self.totals.failed_steps += 1
        outputs = self.scheduler.abandon(plan)
        for context in self.contexts.lost():  # before those who use them: they are older
            self._pin(context)
        self.scheduler.blocks.shrink()  # it may have been too large: what is needed is asked for anew
        self.runner.clear(error)
        what = f"The step failed: {type(error).__name__}: {error}"
        return self._open.ended(outputs, self._clock(), what)
