"""Owns the model, the cache of its keys and values, and the backend that both run on: a plan in, logits out.

Nothing else makes a step's arrays or runs the model, and other ranks are led from here. ``launch`` goes on to
tokens that are being drawn. Knows no request and no text.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from tiny_llm.data import Plan, PlanItem
from tiny_llm.decoding.decide import Decision, Drawing, Lap, Row, Sharing, draw, rows_of, within_forms
from tiny_llm.decoding.pooling import PooledRows, gather, pooled_rows
from tiny_llm.engine.batch import build_batch
from tiny_llm.engine.draft import DraftModel
from tiny_llm.engine.ranks import Lead
from tiny_llm.kv.paged import PagedCache
from tiny_llm.memory import BUFFER_POOL_BYTES
from tiny_llm.models.decoder import Decoder
from tiny_llm.models.footprint import activation_bytes
from tiny_llm.models.registry import Model
from tiny_llm.models.replay import Played
from tiny_llm.ops.backend import use
from tiny_llm.proving.choice import Kernels
from tiny_llm.sampling.sampler import sample
from tiny_llm.sampling_params import SamplingParams

_WARM_TOKENS = (1, 2, 4, 8, 16, 32, 64)  # of a step: from one of these to the next each kernel has one text
_WARM_LONG = 128  # tokens before a row whose attention is cut into spans
_DRAWN = SamplingParams(temperature=1.0, seed=0)


@dataclass(slots=True)
class InFlightBatch:
    """A step under way: ``rows`` says whose each row of its logits is, ``pooled`` whose hidden states are.

    ``error`` came up while it was prepared, and is raised when its turn comes. ``is_usual`` is whether such
    steps take about as long. Where ranks work in turns, ``compute`` does this one's part.
    """

    plan: Plan
    rows: list[Row]
    pooled: Sequence[PooledRows] = ()
    drawing: Drawing | None = None
    error: Exception | None = None
    is_usual: bool = True
    compute: Callable[[Lap], Drawing] | None = None

    def decisions(self, lap: Lap) -> list[Decision]:
        """Wait for what it draws. Raises whatever went wrong."""
        if self.error is not None:
            raise self.error
        if self.compute is not None:
            self.drawing = self.compute(lap)
        assert self.drawing is not None
        mx.eval([one.pool.gathered for one in self.pooled])
        return self.drawing.decisions(lap)


class Runner:
    """``model`` on the chosen ``kernels``, with its ``cache``. One thread's: MLX's streams belong to it."""

    def __init__(
        self,
        model: Model,
        cache: PagedCache,
        kernels: Kernels,
        draft: DraftModel | None = None,
        lead: Lead | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.kernels = kernels
        self.draft = draft
        self._tokens, self._most = 0, BUFFER_POOL_BYTES
        # By what each layer's keys are turned to another position; None where they cannot be.
        self.inv_freq: Sequence[mx.array] | None = getattr(model, "inv_freq", None)
        self._lead = lead
        self.groups = 1 if lead is None else lead.groups
        if lead is not None:
            lead.begin(cache)

    def launch(self, plan: Plan, sharing: Sharing, drawn: mx.array | None, lap: Lap) -> InFlightBatch:
        """Start a step: from its plan to tokens that are being drawn for its answers.

        See ``forward``, and ``decide.rows_of`` on ``sharing``. The draft model's guesses become the plan's.
        Of several ``groups`` of sequences, whose steps are under way at once, other ranks begin with it now.
        """
        batch = InFlightBatch(plan, [], is_usual=not (plan.load or plan.joins))  # which takes its own time
        try:
            with use(self.kernels.backend, self.kernels.ours):
                in_turns = self.groups > 1
                if not in_turns:
                    self._move(plan)
                batch.plan = within_forms(plan, sharing)
                if self.draft is not None:
                    batch.plan = self.draft.guessed(batch.plan, sharing)
                    batch.is_usual &= not self.draft.was_behind
                    lap("draft")
                batch.rows = rows_of(batch.plan, sharing)
                batch.pooled = pooled_rows(batch.plan, lambda seq_id: sharing(seq_id)[0].pool)
                if self._lead is not None:
                    drawn = self._lead.step(batch.plan, drawn)
                if in_turns:
                    batch.compute = partial(self._compute, batch)
                    return batch
                batch.drawing = draw(self.forward(batch.plan, drawn, lap, batch.pooled), batch.rows, lap)
        except Exception as error:
            batch.error = error
        return batch

    def _compute(self, batch: InFlightBatch, lap: Lap) -> Drawing:
        """This rank's part of a step that others have begun: the last one, when its turn has come."""
        with use(self.kernels.backend, self.kernels.ours):
            self._move(batch.plan)
            if not batch.plan.items:
                return draw(mx.zeros((0, self.model.config.vocab_size)), [], lap)
            return draw(self.forward(batch.plan, None, lap, batch.pooled), batch.rows, lap)

    def settle(self, batches: list[InFlightBatch]) -> None:
        """Forget steps whose tokens nobody wants; what other ranks have begun is brought to its end."""
        while batches:
            batch = batches.pop(0)
            if batch.compute is not None:
                batch.decisions(lambda _: None)

    def forward(
        self, plan: Plan, drawn: mx.array | None, lap: Lap, pooled: Sequence[PooledRows] = ()
    ) -> mx.array:
        """Logits [R, V] for the plan's rows, lazily. Its keys and values are kept as they are computed.

        ``drawn`` are the tokens that the step before is drawing, if the plan goes on with them. What is
        ``pooled`` gets its hidden states.

        Raises ValueError for logits of another shape, which a plug-in's model may give: a token that is
        drawn from them would be an index that nobody checks.
        """
        batch = build_batch(plan, self.cache.format.block_size, drawn)
        self._make_room(batch.tokens.size, batch.logit_rows.size)
        lap("build")
        if pooled:
            rows = mx.array([row for one in pooled for row in one.rows], mx.int32)
            model = self.model.model if isinstance(self.model, Played) else self.model
            assert isinstance(model, Decoder), "others are refused by LLM.check"
            logits, hidden = model.with_hidden(batch, self.cache, rows)
            gather(pooled, hidden)
        else:
            logits = self.model(batch, self.cache)
        lap("forward")
        expected = batch.logit_rows.size, self.model.config.vocab_size
        if logits.shape != expected:
            raise ValueError(f"the model gave logits {logits.shape}, expected {expected}")
        return logits

    def _make_room(self, tokens: int, rows: int) -> None:
        """Let go of what MLX kept of a step of another size, where that and this one take more than any did.

        Few of its buffers would be used again: a long prompt's last tokens took theirs beside those of 2,048.
        """
        need = activation_bytes(self.model.config, tokens, rows)
        self._most = max(self._most, need)
        if tokens != self._tokens and need + mx.get_cache_memory() > self._most:
            mx.clear_cache()
        self._tokens = tokens

    def move(self, plan: Plan) -> None:
        """Do to the pages what comes before a step, and let the other ranks do so."""
        if self._lead is not None:
            self._lead.step(plan)
        with use(self.kernels.backend, self.kernels.ours):
            self._move(plan)

    def _move(self, plan: Plan) -> None:
        if self.draft is not None:
            self.draft.follow(plan)
        self.cache.save(plan.save)
        self.cache.prepare(plan)
        self.cache.load(plan.load)
        if plan.joins:
            assert self.inv_freq is not None, "keys can be turned"
            self.cache.join(plan.joins, self.inv_freq)

    @property
    def is_whole(self) -> bool:
        """Whether all of the model runs in this process."""
        return self._lead is None

    def give(self, blocks: Sequence[int]) -> list[memoryview]:
        """What these blocks hold, for another process."""
        with use(self.kernels.backend, self.kernels.ours):
            return self.cache.give(blocks)

    def take(self, data: mx.array, count: int, pairs: Sequence[tuple[int, int]]) -> None:
        """Let blocks hold what another process gave: see ``PagedCache.take``."""
        with use(self.kernels.backend, self.kernels.ours):
            if self.draft is not None:
                self.draft.forget(block for _, block in pairs)
            self.cache.take(data, count, pairs)

    def warm_up(self, most_blocks: int) -> None:
        """Have a GPU's kernels compiled, so that no request waits for that."""
        if self._lead is not None:
            self._lead.warm_up(most_blocks)
        with use(self.kernels.backend, self.kernels.ours):
            _warm_up(self.model, self.cache, most_blocks)
            if self.draft is not None:
                _warm_up(self.draft.model, self.draft.cache, most_blocks)

    def swap_ms(self) -> float:
        """Milliseconds that a block takes to host memory and back."""
        with use(self.kernels.backend, self.kernels.ours):
            return self.cache.swap_ms()

    def clear(self, error: Exception) -> None:
        """Let go of all: a step broke by ``error``. Raises GroupError where other ranks were in it."""
        if self._lead is not None:
            self._lead.fail(error)
        self.let_go()

    def let_go(self) -> None:
        """Let go of all keys and values."""
        self.cache.clear()
        if self.draft is not None:
            self.draft.clear()


def _warm_up(model: Model, cache: PagedCache, most_blocks: int) -> None:
    """Run ``model`` over ``cache`` once for each text of a kernel, on the backend in use; it forgets all."""
    for plan in _plans(cache.format.block_size):
        if plan.num_blocks <= most_blocks:
            cache.prepare(plan)
            logits = model(build_batch(plan, cache.format.block_size), cache)
            rows = logits.shape[0]
            mx.eval(sample(logits, [_DRAWN] * rows, [0] * rows), *cache.arrays())
    cache.clear()


def _plans(block_size: int) -> Iterator[Plan]:
    """Steps of one sequence, all of whose logits are wanted, and one of two that begin alike."""
    for start, count in [*((0, tokens) for tokens in _WARM_TOKENS), (_WARM_LONG, 1)]:
        blocks = -(-(start + count) // block_size)
        item = PlanItem(0, array("i", [0] * count), start, array("i", range(blocks)), count)
        yield Plan([item], blocks)
    other = item._replace(seq_id=1, block_table=array("i", [*range(blocks - 1), blocks]))
    yield Plan([item, other], blocks + 1)
