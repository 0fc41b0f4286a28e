"""Owns the guesses of a step: who makes them, which of them are checked, and how many were right."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping

from tiny_llm.data import Advance, Drafter, Plan, PlanItem, Sequence
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.scheduler.drafts import Acceptance, Worth
from tiny_llm.scheduler.places import Place, StepPlan
from tiny_llm.scheduler.speed import StepTime

_MOST_DRAFTED = 16  # guesses of one sequence in a step


class Speculation:
    """What ``sources`` guess, the first that has an idea, and how well.

    By source: ``drafted`` guesses were checked, ``accepted`` of them were right.
    """

    def __init__(self, sources: Mapping[str, Drafter]) -> None:
        self.drafted, self.accepted = Counter(dict.fromkeys(sources, 0)), Counter(dict.fromkeys(sources, 0))
        self._sources = sources

    def extend(
        self, step: StepPlan, places: Mapping[int, Place], speed: StepTime, blocks: BlockManager
    ) -> None:
        """Let decodes check as many guesses as are expected to pay; nobody makes room for them."""
        worth = Worth(speed, step.decodes, step.decode_context)
        kept = int(len(places) > step.decodes)  # of the tokens, for whoever catches up
        for index, item in enumerate(step.items):
            place = places[item.seq_id]
            if place.answers > 1:  # they part at the token that is drawn now
                continue
            seq, table, known = place.seq, place.table, place.acceptance
            left = seq.prompt_len + seq.params.max_tokens - 1 - len(seq.tokens)  # the last is not computed
            most = min(left, step.tokens - kept)
            draft = self._guesses(seq, known, max(1, min(most, _MOST_DRAFTED)))
            draft = draft[: worth.length(known.share, min(most, len(draft)))]
            end = len(seq.tokens) + len(draft)
            if draft and (end <= table.writable or blocks.reserve(table, item.start, end)):
                tokens = item.tokens + draft
                held = table.blocks[: blocks.blocks_for(end)]
                step.items[index] = PlanItem(seq.id, tokens, item.start, held, len(tokens))
                step.drafted += len(draft)
                step.tokens -= len(draft)

    def is_expected(self, plan: Plan, places: Mapping[int, Place], speed: StepTime) -> bool:
        """Whether, behind a token that ``plan`` is drawing, a guess will be worth checking.

        Which token is expected to come is noted of each, so that it shows how good such guesses are.
        """
        worth, is_expected = Worth(speed, plan.decodes, plan.decode_context), False
        for item in plan.items:
            place = places[item.seq_id]
            draft = self._guesses(place.seq, place.acceptance, 2)
            if len(draft) == 2 and worth.length(place.acceptance.share, 1) == 1:
                is_expected = True
        return is_expected

    def count(self, known: Acceptance, drafted: int, advance: Advance) -> None:
        """See how good guesses were: the ``drafted`` ones of a step, or one that was only noted."""
        if drafted <= 0:
            for token in advance.tokens:
                known.compare(token)
            known.drift()
            return
        accepted = max(0, len(advance.tokens) - 1)
        if not advance.finish_reason:  # else it was not looked at to its end
            known.observe(drafted, accepted)
        known.guess = -1
        self.drafted[known.source] += drafted
        self.accepted[known.source] += accepted

    def _guesses(self, seq: Sequence, known: Acceptance, most: int) -> array[int]:
        """Up to ``most`` guesses; the first of them is noted."""
        known.guess = -1
        for source, drafter in self._sources.items() if seq.params.speculate else ():
            if draft := drafter(seq, most):
                known.source, known.guess = source, draft[0]
                return draft
        return array("i")
