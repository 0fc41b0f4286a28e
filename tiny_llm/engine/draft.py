"""Owns the draft model: a small model that guesses what a large one will draw, over pages of its own.

Its keys and values lie under the block ids of the large one's, and go where those go: prefix hits, forks,
swap and eviction are the block manager's, and need nothing here. It draws with the noise of the position
that it guesses, so two models that think alike mostly draw alike, whatever the temperature.
Knows no request: a plan comes in, and the same plan goes out with its guesses known.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import mlx.core as mx

from tiny_llm.data import GUESS, Plan, PlanItem, Sequence
from tiny_llm.engine.batch import build_batch
from tiny_llm.engine.settings import Speculation
from tiny_llm.errors import ConfigError
from tiny_llm.kv.paged import PagedCache
from tiny_llm.models.checkpoint import Checkpoint, FolderCheckpoint
from tiny_llm.models.loading import load_model
from tiny_llm.models.registry import Model
from tiny_llm.sampling.sampler import sample
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.weights.hub import resolve

BUNDLED_MODEL, BUNDLED_DRAFT = "demo", "demo-draft"
ParamsOf = Callable[[int], SamplingParams]
"""How a sequence's tokens are drawn, by its id."""


def which_draft(
    model: str | Path | Checkpoint, speculate: Speculation | None, draft: str | Path | Checkpoint | None
) -> tuple[Speculation, str | Path | Checkpoint | None]:
    """How to guess, and by which draft model, where one of the two or neither is said.

    Raises ConfigError for wishes that contradict each other.
    """
    if speculate == "draft" and draft is None:
        if model != BUNDLED_MODEL:
            raise ConfigError(
                "speculate (--speculate) is 'draft', but no draft model is named; give draft (--draft) a "
                "small model of the same tokenizer, such as qwen2.5-0.5b beside qwen2.5-7b."
            )
        draft = BUNDLED_DRAFT
    if draft is not None and speculate not in (None, "draft"):
        raise ConfigError(f"speculate is {speculate!r}, but a draft model is named; leave one of them out.")
    return speculate or ("ngram" if draft is None else "draft"), draft


def load_draft(draft: str | Path | Checkpoint, target: Checkpoint, *, offline: bool) -> Model:
    """The draft model, for the backend in use; its matrices in 8 bits where they are not quantized already.

    Raises ConfigError if its tokens are not the ``target``'s.
    """
    if isinstance(draft, (str, Path)):
        draft = FolderCheckpoint(resolve(str(draft), offline=offline))
    if not draft.tokenizer.has_tokens_of(target.tokenizer):
        raise ConfigError(
            "The draft model's tokens are not the model's: with another vocabulary its guesses mean other "
            "texts; take a draft model of the same family."
        )
    return load_model(draft, quantize=None if draft.config.quantization else 8)


def to_be_guessed(seq: Sequence, most: int) -> array[int]:
    """A ``Drafter``: places for ``most`` guesses of the draft model."""
    return array("i", [GUESS]) * most


class DraftModel:
    """``model``, and the ``cache`` of its keys and values. One thread's."""

    def __init__(self, model: Model, cache: PagedCache) -> None:
        self.model = model
        self.cache = cache

    def follow(self, plan: Plan, drawn: mx.array | None) -> None:
        """Take in the tokens of a step that has no guesses, some of which may be being ``drawn``."""
        quiet = [item._replace(logit_rows=0) for item in plan.items]
        self._run(replace(plan, items=quiet), drawn)
        mx.async_eval(self.cache.arrays())  # type: ignore[no-untyped-call]  # MLX's stubs lack its types

    def guessed(self, plan: Plan, params_of: ParamsOf) -> Plan:
        """``plan`` with its guesses known; its other tokens are taken in on the way.

        All sequences guess their next token together, and each one's guess is what it goes on from. The last
        guess is taken in too: it may turn out right.
        """
        if not plan.drafted:
            self.follow(plan, None)
            return plan
        going = [item for item in plan.items if item.tokens[-1] == GUESS]
        logits = self._run(replace(plan, items=[_known(item) for item in plan.items]), None)
        rounds: list[tuple[list[PlanItem], mx.array]] = []
        number = 1
        while going:
            params = [params_of(item.seq_id) for item in going]
            guesses = sample(logits, params, [item.start + number for item in going])
            rounds.append((going, guesses))
            items = [_goes_on(item, row, number) for row, item in enumerate(going)]
            logits = self._run(Plan(items, plan.num_blocks, [], [], []), guesses)
            going = [item for item in going if len(item.tokens) > number + 1]
            number += 1
        mx.eval(self.cache.arrays(), *(guesses for _, guesses in rounds))
        return replace(plan, items=_filled(plan.items, rounds))

    def _run(self, plan: Plan, drawn: mx.array | None) -> mx.array:
        """Logits of a plan's rows, lazily; what the plan moves is moved here too."""
        batch = build_batch(plan, self.cache.format.block_size, drawn)
        self.cache.prepare(plan)
        return self.model(batch, self.cache)


def _known(item: PlanItem) -> PlanItem:
    """An item's known tokens; where guesses are to follow, the first is drawn from the last of them."""
    if item.tokens[-1] != GUESS:
        return item._replace(logit_rows=0)
    return item._replace(tokens=item.tokens[:1], logit_rows=1)


def _goes_on(item: PlanItem, row: int, number: int) -> PlanItem:
    """The step that takes in an item's guess ``number``, and draws the next one if there is to be one."""
    more = int(len(item.tokens) > number + 1)
    return PlanItem(item.seq_id, array("i", (-1 - row,)), item.start + number, item.block_table, more)


def _filled(items: list[PlanItem], rounds: list[tuple[list[PlanItem], mx.array]]) -> list[PlanItem]:
    guesses: dict[int, array[int]] = {}
    for going, drawn in rounds:
        for item, token in zip(going, cast(list[int], drawn.tolist()), strict=True):
            guesses.setdefault(item.seq_id, array("i")).append(token)
    return [
        item._replace(tokens=item.tokens[:1] + guesses[item.seq_id]) if item.seq_id in guesses else item
        for item in items
    ]
