"""Owns the draft model: a small model that guesses what a large one will draw, over pages of its own.

Its keys and values lie under the block ids of the large one's, and go where those go: prefix hits, forks,
swap and eviction are the block manager's, and need nothing here. It draws with the noise of the position
that it guesses, so two models that think alike mostly draw alike, whatever the temperature.
A plan comes in, and the same plan goes out with its guesses known.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx

from tiny_llm.data import GUESS, Drafter, Plan, PlanItem, Sequence
from tiny_llm.decoding.answer import Answer
from tiny_llm.decoding.decide import Row, Sharing, changed, with_guesses
from tiny_llm.decoding.ngram import ngram_draft, predicted_draft
from tiny_llm.engine.batch import build_batch
from tiny_llm.engine.settings import Speculation
from tiny_llm.errors import ConfigError
from tiny_llm.kv.paged import PagedCache
from tiny_llm.models.checkpoint import Checkpoint, open_checkpoint
from tiny_llm.models.loading import kv_dtype
from tiny_llm.models.registry import Model
from tiny_llm.proving.record import Shapes
from tiny_llm.sampling.sampler import sample
from tiny_llm.weights.hub import resolve

BUNDLED_MODEL, BUNDLED_DRAFT = "demo", "demo-draft"
_MOST_READ = 256  # tokens in a step, before its guesses


def which_draft(
    model: str | Path | Checkpoint, speculate: Speculation | None, draft: str | Path | Checkpoint | None
) -> tuple[Speculation | None, str | Path | Checkpoint | None]:
    """How to guess, if that is said, and by which draft model, where one of the two or neither is said.

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
    return speculate if draft is None else "draft", draft


def open_draft(draft: str | Path | Checkpoint, target: Checkpoint, *, offline: bool) -> Checkpoint:
    """The draft model, not loaded yet. Raises ConfigError if its tokens are not the ``target``'s."""
    if isinstance(draft, (str, Path)):
        draft = open_checkpoint(resolve(str(draft), offline=offline))
    if not draft.tokenizer.has_tokens_of(target.tokenizer):
        raise ConfigError(
            "The draft model's tokens are not the model's: with another vocabulary its guesses mean other "
            "texts; take a draft model of the same family."
        )
    return draft


def draft_shapes(draft: Checkpoint, block_size: int) -> Shapes:
    """What kernels of the backend in use are to be tried on for it."""
    bits = draft_bits(draft)
    return Shapes.of(draft.config, bits, kv_dtype(draft.config, dtype=None, quantize=bits), block_size)


def draft_bits(draft: Checkpoint) -> int | None:
    """Into how many its matrices are packed on loading, where they are not quantized already."""
    return None if draft.config.quantization else 8


def drafters_of(speculate: Speculation) -> Mapping[str, Drafter]:
    """Who guesses, by source: none, or whoever the request and the settings name."""
    if speculate == "off":
        return {}
    return {"prediction": predicted_draft, speculate: to_be_guessed if speculate == "draft" else ngram_draft}


def to_be_guessed(seq: Sequence, most: int) -> array[int]:
    """A ``Drafter``: places for ``most`` guesses of the draft model."""
    return array("i", [GUESS]) * most


class DraftModel:
    """``model``, and the ``cache`` of its keys and values. One thread's.

    It reads a sequence when it is to guess, and not before: where nobody asks it, it costs nothing. What it
    has read is known by block, whoever's it was.
    """

    def __init__(self, model: Model, cache: PagedCache) -> None:
        self.model = model
        self.cache = cache
        self.was_behind = False  # in the latest step it read more than what was new
        self._read = array("i")  # so many of each block's tokens, from its first on
        self._read_on_host: dict[int, int] = {}

    def clear(self) -> None:
        """Let go of all keys and values."""
        self.cache.clear()
        self._read, self._read_on_host = array("i"), {}

    def guessed(self, plan: Plan, sharing: Sharing) -> Plan:
        """``plan`` with its guesses known. A sequence that was not read to its end yet gets none.

        All sequences guess their next token together, and each one's guess is what it goes on from. A guess
        is drawn as its answer draws: by its noise, its penalties, its form.
        """
        self.was_behind = False
        asked = [item for item in plan.items if item.tokens[-1] == GUESS]
        if not asked:
            return plan
        answers = {item.seq_id: sharing(item.seq_id)[0] for item in asked}
        reads = self._unread(asked, answers)
        guesses = {item.seq_id: array("i") for item in reads if item.logit_rows}
        going = [item for item in asked if item.seq_id in guesses]
        number = 1
        while reads:
            logits = self._run(reads)
            rows = [
                Row(n, answers[item.seq_id], item.start + number, guesses[item.seq_id])
                for n, item in enumerate(going)
            ]
            for item, token in zip(going, _drawn(logits, rows), strict=True):
                guesses[item.seq_id] = guesses[item.seq_id] + array("i", [token])
            going = [item for item in going if len(item.tokens) > number + 1]
            reads = [
                PlanItem(item.seq_id, guesses[item.seq_id][-1:], item.start + number, item.block_table, 1)
                for item in going
            ]
            number += 1
        mx.async_eval(self.cache.arrays())  # type: ignore[no-untyped-call]  # MLX's stubs lack its types
        known = {item.seq_id: item.tokens[1:] for item in plan.items[: plan.decodes]}
        known |= dict.fromkeys(answers, array("i")) | guesses
        return with_guesses(plan, list(known.values()))

    def follow(self, plan: Plan) -> None:
        """Move what the plan moves; what it writes is unread, and what lay behind that is no one's."""
        self.cache.prepare(plan)
        read, host = self._read, self._read_on_host
        read.extend([0] * (plan.num_blocks - len(read)))
        for block, slot in plan.swap_out:
            host[slot] = read[block]
        for block, copied in plan.copies:
            read[copied] = read[block]
        for slot, block in plan.swap_in:
            read[block] = host[slot]
        self.forget(block for _, block in plan.load)
        for item in plan.items:
            for block, first in self._reach(item):
                read[block] = min(read[block], max(0, item.start - first))
        del read[plan.num_blocks :]

    def forget(self, blocks: Iterable[int]) -> None:
        """What these hold was written by somebody else: it is unread."""
        for block in blocks:
            self._read[block] = 0

    def _reach(self, item: PlanItem) -> Iterator[tuple[int, int]]:
        """The blocks that the item's tokens go to, each with the position of its first token."""
        size = self.cache.format.block_size
        for number in range(item.start // size, -(-(item.start + len(item.tokens)) // size)):
            yield item.block_table[number], number * size

    def _unread(self, asked: list[PlanItem], answers: Mapping[int, Answer]) -> list[PlanItem]:
        """What is to be read before the first guesses: at most so much in a step, the first ones first."""
        size, room, reads = self.cache.format.block_size, _MOST_READ, list[PlanItem]()
        for item in asked:
            full = next(n for n, block in enumerate(item.block_table) if self._read[block] < size)
            start = full * size + self._read[item.block_table[full]]
            tokens = (answers[item.seq_id].tokens[start : item.start] + item.tokens[:1])[:room]
            room -= len(tokens)
            self.was_behind |= len(tokens) > 2  # a step's last guess is read in the next one
            if tokens:
                rows = int(start + len(tokens) > item.start)
                reads.append(PlanItem(item.seq_id, tokens, start, item.block_table, rows))
        return reads

    def _run(self, items: list[PlanItem]) -> mx.array:
        """Logits of the items' rows, lazily."""
        size = self.cache.format.block_size
        batch = build_batch(Plan(items, len(self._read)), size)
        for item in items:
            for block, first in self._reach(item):
                self._read[block] = min(size, item.start + len(item.tokens) - first)
        return self.model(batch, self.cache)


def _drawn(logits: mx.array, rows: list[Row]) -> list[int]:
    """A token for each row. Nothing comes of an error but a wrong guess."""
    if not rows:
        return []
    scores = changed(logits, rows, [None] * len(rows))
    tokens = sample(scores, [row.answer.params for row in rows], [row.position for row in rows])
    return cast(list[int], tokens.tolist())
