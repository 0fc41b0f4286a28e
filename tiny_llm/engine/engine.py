"""Owns the step loop: requests in, chunks out, many at a time. Chapter 3.4.

One step: the scheduler plans, the plan becomes a batch, the model makes logits, each row gets
a token, text is made of it, the scheduler commits. All of it on one thread, the caller's.
A fault in one request ends that request; a fault of the step ends those in it, and the
engine goes on. Knows no HTTP and no terminal.
"""

from __future__ import annotations

import secrets
import time
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count
from typing import NamedTuple

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.data import Advance, Chunk, EndReason, Output, Plan, PlanItem, SamplingParams
from tiny_llm.data import Sequence as TokenSequence
from tiny_llm.engine.batch import build_batch
from tiny_llm.engine.memory import available_memory_bytes
from tiny_llm.engine.request import Choice, Request
from tiny_llm.engine.sample_step import Drawing, Drawn, Scoring, begin, needs_history
from tiny_llm.engine.stats import EngineStats, Snapshot, StepClock
from tiny_llm.engine.trace import Trace
from tiny_llm.errors import ConfigError
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.kv.paged import PagedCache
from tiny_llm.models.footprint import kv_token_bytes
from tiny_llm.models.registry import Model
from tiny_llm.ops.backend import use
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.tokenizer.tokenizer import Tokenizer

BLOCK_SIZE = 16
"""Tokens of a block, unless an operator says otherwise."""
KV_SLAB_BYTES = 2**26
"""The pool grows by this much at a time."""
BUFFER_POOL_BYTES = 2**29
"""What MLX may keep of buffers that it has freed, to be used again."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an operator may set. ``kv_blocks`` is the pool's limit in blocks of ``block_size`` tokens.

    ``async_scheduling``: where the next step is known but for its tokens, prepare it while this one runs.
    """

    kv_blocks: int
    block_size: int = BLOCK_SIZE
    slab_blocks: int = 256
    host_blocks: int = 0
    prefix_cache: bool = True
    async_scheduling: bool = True
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)

    @classmethod
    def fitting(
        cls,
        config: ModelConfig,
        kv_dtype: mx.Dtype,
        kv_memory: int | None = None,
        scheduler: SchedulerSettings | None = None,
    ) -> EngineSettings:
        """Settings for ``kv_memory`` bytes of keys and values; None: half of what the machine has free."""
        block = BLOCK_SIZE * kv_token_bytes(config, kv_dtype.size)
        memory = available_memory_bytes() // 2 if kv_memory is None else kv_memory
        if memory < block:
            raise ConfigError(
                f"kv_memory is {memory} bytes, but one block of {BLOCK_SIZE} tokens takes {block}."
            )
        return cls(
            kv_blocks=memory // block,
            slab_blocks=max(1, KV_SLAB_BYTES // block),
            scheduler=scheduler or SchedulerSettings(),
        )


@dataclass(slots=True)
class _Flight:
    """A step under way: ``rows`` has the choices that draw from each row of logits.

    ``error`` came up while it was prepared, and is raised when its turn comes.
    """

    plan: Plan
    rows: list[list[Choice]]
    logits: mx.array | None = None
    drawing: Drawing | None = None
    scorings: Sequence[Scoring] = ()
    error: Exception | None = None

    def end(self, clock: StepClock) -> list[Drawn]:
        """Wait for it. Raises whatever went wrong."""
        if self.error is not None:
            raise self.error
        for scoring in self.scorings:
            mx.eval(*scoring.report)
            scoring.keep()
        if self.drawing is not None:
            return self.drawing.end(clock)
        mx.eval(self.logits)
        clock.lap("forward")
        return []


class Event(NamedTuple):
    """A chunk of an answer, and whose."""

    request_id: int
    chunk: Chunk


class Engine:
    """Serves requests on one model. ``healthy`` is whether the last step worked."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        settings: EngineSettings,
        *,
        backend: str,
        kv_dtype: mx.Dtype,
        end_ids: Collection[int],
        max_context: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        config = model.config
        self.settings = settings
        self.healthy = True
        self.totals = EngineStats()
        self.trace: Trace | None = None  # give it one, and it is written to
        self._model = model
        self._tokenizer = tokenizer
        self._backend = backend
        self._end_ids = end_ids
        self._max_context = max_context
        self._clock = clock
        self._numbers = count(1)  # of sequences and of requests: a request has its first sequence's
        self._requests: dict[int, Request] = {}
        self._choices: dict[int, Choice] = {}  # by sequence
        self._ahead: _Flight | None = None
        self.cache = PagedCache(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            block_size=settings.block_size,
            max_blocks=settings.kv_blocks,
            host_blocks=settings.host_blocks,
            dtype=kv_dtype,
        )
        blocks = BlockManager(
            settings.block_size,
            settings.kv_blocks,
            slab=settings.slab_blocks,
            host_blocks=settings.host_blocks,
            prefix_cache=settings.prefix_cache,
        )
        scheduler = settings.scheduler
        if settings.host_blocks and scheduler.swap_ms_per_block is None:
            with use(backend):
                scheduler = replace(scheduler, swap_ms_per_block=self.cache.swap_ms())
        self.scheduler = Scheduler(blocks, scheduler)
        mx.set_cache_limit(BUFFER_POOL_BYTES)

    def __len__(self) -> int:
        """Requests that are waiting or running."""
        return len(self._requests)

    def add(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        salt: str = "",
        arrival_s: float | None = None,
    ) -> int:
        """Take a request in and return its id; the prompt fits the context. Without a seed it draws one.

        ``arrival_s``: when it came, by the engine's clock, if that was before now.

        Raises CapacityError if it can never fit the KV memory, BusyError if too many wait,
        RequestError for a priority out of range.
        """
        now = self._clock() if arrival_s is None else arrival_s
        limit = min(params.max_tokens, self._max_context - len(prompt))
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(64))
        number = next(self._numbers)
        request = Request.of(number, prompt, params, self._tokenizer, self._end_ids, limit, now)
        if params.prompt_logprobs is not None:  # a prefix that is found would have no logits
            salt = f"{salt}/{number}"
        deadline = now + timeout_s if timeout_s is not None else float("inf")
        own = replace(params, max_tokens=limit)
        self.scheduler.add(
            TokenSequence(number, array("i", prompt), own, priority, now, deadline=deadline, salt=salt)
        )
        self._requests[number] = request
        self._choices[number] = request.choices[0]
        if self.trace is not None:
            self.trace.arrived(number, now)
        return number

    def stats(self) -> Snapshot:
        """All figures of the moment, for whoever reports them. To be called between two steps."""
        return Snapshot.of(
            self.scheduler, self.totals, healthy=self.healthy, block_bytes=self.cache.block_bytes
        )

    def cancel(self, request_id: int) -> list[Event]:
        """End a request now; its blocks are free when this returns. Nothing if it has ended."""
        ended = [number for number, choice in self._choices.items() if choice.request.id == request_id]
        outputs = [self.scheduler.cancel(number) for number in ended]
        return self._ended([output for output in outputs if output])

    def rest(self) -> None:
        """Nobody has asked for a while: give the pool's memory back, and what it remembers with it."""
        assert not self._requests, "requests are waiting or running"
        self._ahead = None
        self.scheduler.blocks.shrink()
        self.cache.clear()
        mx.clear_cache()

    def step(self) -> list[Event]:
        """Run one step and return what came of it; nothing to do is no step."""
        events = self._ended(self.scheduler.expire(self._clock()))
        clock = StepClock(self.totals, self._clock)
        flight, self._ahead = self._ahead or self._next(clock), None
        if flight is None:
            return events
        plan = flight.plan
        try:
            if flight.drawing is not None and self.settings.async_scheduling:
                self._ahead = self._following(flight, flight.drawing, clock)
            drawn = flight.end(clock)
        except Exception as error:  # whatever it was, those who are not in this step must not pay for it
            self.healthy, self._ahead = False, None
            return events + self._failed(plan, error)
        self.healthy = True
        events += self._commit(plan, flight.rows, drawn)
        if not len(self.scheduler):
            self._ahead = None  # all of its sequences have ended
        clock.lap("commit")
        ms = clock.done(plan)
        self.scheduler.speed.observe(plan, ms)
        if self.trace is not None:
            now = self._clock()
            self.trace.step(plan, now - ms / 1e3, now)
        return events

    def _next(self, clock: StepClock) -> _Flight | None:
        """Start the step that the scheduler plans; None if there is nothing to do."""
        plan = self.scheduler.schedule()
        for item in plan.items:
            request = self._choices[item.seq_id].request
            if not request.started_s:
                self._note_start(request, item.seq_id)
        clock.lap("schedule")
        return self._launch(plan, None, clock) if plan.items else None

    def _note_start(self, request: Request, seq_id: int) -> None:
        sequence = self.scheduler.sequence(seq_id)
        assert sequence is not None, "it is in the plan"
        request.started_s = self._clock()
        request.cached_tokens = sequence.cached_tokens
        self.totals.queue_s.add(request.started_s - request.arrival)

    def _following(self, flight: _Flight, drawing: Drawing, clock: StepClock) -> _Flight | None:
        """Start the step after one under way, if it is known but for the tokens that are being drawn."""
        items = flight.plan.items
        if len(drawing.choices) > len(items) or any(map(needs_history, drawing.choices)):
            return None
        ends = [choice.answer.is_last for choice in drawing.choices]
        leaving = {item.seq_id for item, last in zip(items, ends, strict=False) if last}
        plan = self.scheduler.follow(flight.plan, leaving)
        clock.lap("schedule")
        if plan is None:
            return None
        tokens = drawing.tokens.astype(mx.int32)
        if leaving:
            tokens = tokens[mx.array([row for row, last in enumerate(ends) if not last])]
        return self._launch(plan, tokens, clock)

    def _launch(self, plan: Plan, tokens: mx.array | None, clock: StepClock) -> _Flight:
        """From a plan to tokens that are being drawn. ``tokens`` are those that the plan does not know."""
        flight = _Flight(plan, [self._drawn_from(item) for item in plan.items if item.logit_rows])
        try:
            with use(self._backend):
                batch = build_batch(plan, self.settings.block_size, tokens)
                self.cache.prepare(plan)
                clock.lap("build")
                flight.logits = logits = self._model(batch, self.cache)
                clock.lap("forward")
                flight.scorings = self._scorings(plan, logits)
                choices = [choice for row in flight.rows for choice in row]
                ends = accumulate(item.logit_rows for item in plan.items if item.logit_rows)
                rows = [end - 1 for end, row in zip(ends, flight.rows, strict=True) for _ in row]
                if choices and rows != list(range(logits.shape[0])):
                    # Several answers begin from one prompt's last row, or others are of a prompt itself.
                    logits = logits[mx.array(rows)]
                if choices:
                    flight.drawing = begin(logits, choices, int(tokens is not None), clock)
                    flight.logits = None
        except Exception as error:
            flight.error = error
        return flight

    def _drawn_from(self, item: PlanItem) -> list[Choice]:
        """The choices that get a token from an item's last row: none in the middle of a prompt."""
        choices = self._drawing(item.seq_id)
        is_whole = item.start + len(item.tokens) >= len(choices[0].request.prompt)
        return choices if is_whole else []

    def _scorings(self, plan: Plan, logits: mx.array) -> list[Scoring]:
        """What is to be reported of prompts in this step."""
        found, first = [], 0
        for item in plan.items:
            choice, end = self._choices[item.seq_id], first + item.logit_rows
            within = first < end and item.start + 1 < len(choice.request.prompt)
            if within and choice.params.prompt_logprobs is not None:
                found.append(Scoring.of(logits[first:end], choice, item.start))
            first = end
        return found

    def _drawing(self, seq_id: int) -> list[Choice]:
        choice = self._choices[seq_id]
        begins = choice.index == 0 and not choice.answer.token_ids
        return choice.request.choices if begins else [choice]

    def _commit(self, plan: Plan, rows: Sequence[list[Choice]], drawn: Sequence[Drawn]) -> list[Event]:
        events: list[Event] = []
        advances: list[Advance] = []
        remaining, now = iter(drawn), self._clock()
        seq_ids = [item.seq_id for item in plan.items if item.logit_rows]
        for seq_id, choices in zip(seq_ids, rows, strict=True):
            if not choices:
                advances.append(Advance(seq_id, ()))
                continue
            if self.scheduler.sequence(seq_id) is None:  # it ended while this step was under way
                for _ in choices:
                    next(remaining)
                advances.append(Advance(seq_id, ()))
                continue
            advance = self._advance(seq_id, choices[0], next(remaining), now, events)
            if len(choices) > 1:
                forks = [
                    self._advance(next(self._numbers), choice, next(remaining), now, events)
                    for choice in choices[1:]
                ]
                advance = advance._replace(forks=tuple(forks))
            advances.append(advance)
        self.scheduler.commit(plan, advances)
        for advance, choices in zip(advances, rows, strict=True):
            if choices and (advance.finish_reason or advance.forks):
                self._forget(advance.seq_id, choices[0].request)
        return events

    def _advance(self, number: int, choice: Choice, drawn: Drawn, now: float, events: list[Event]) -> Advance:
        """One token for one answer, or its end by an error of its own."""
        request = choice.request
        self._choices[number] = choice
        if drawn.error is not None:
            events.append(Event(request.id, choice.ended("error", now, drawn.error)))
            self.totals.count_end("error")
            return Advance(number, (), "error")
        self.totals.count_token(choice, now)
        chunk = choice.push(drawn.token, drawn.logprobs, now)
        events.append(Event(request.id, chunk))
        reason: EndReason | None = choice.answer.finish_reason
        if reason:
            self.totals.count_end(reason)
        return Advance(number, (drawn.token,), reason)

    def _forget(self, seq_id: int, request: Request) -> None:
        """Drop what has ended: sequences, and the request with its last answer."""
        ended = [n for n in (seq_id, *self._numbers_of(request)) if self.scheduler.sequence(n) is None]
        for number in ended:
            self._choices.pop(number, None)
        if not self._numbers_of(request):
            self._requests.pop(request.id, None)

    def _numbers_of(self, request: Request) -> list[int]:
        if len(request.choices) == 1:
            return [request.id] if request.id in self._choices else []
        return [number for number, choice in self._choices.items() if choice.request is request]

    def _ended(self, outputs: Sequence[Output], error: str | None = None) -> list[Event]:
        """The chunks of sequences that the scheduler ended. One that had not begun ends all its answers."""
        events: list[Event] = []
        now = self._clock()
        for output in outputs:
            assert output.finish_reason is not None
            for choice in self._drawing(output.seq_id):
                chunk = choice.ended(output.finish_reason, now, error)
                events.append(Event(choice.request.id, chunk))
                self.totals.count_end(output.finish_reason)
            request = self._choices.pop(output.seq_id).request
            if not self._numbers_of(request):
                self._requests.pop(request.id, None)
        return events

    def _failed(self, plan: Plan, error: Exception) -> list[Event]:
        """The step broke: its requests end with the error, the pool is made anew, the others start over."""
        self.totals.failed_steps += 1
        outputs = self.scheduler.abandon(plan)
        self.cache.clear()
        return self._ended(outputs, f"The step failed: {type(error).__name__}: {error}")
