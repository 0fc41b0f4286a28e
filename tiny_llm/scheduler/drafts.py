"""Owns how many tokens of a draft are worth checking: how often guesses were right, against what a row costs.

A step that checks k guesses of a sequence gives it the right ones before the first wrong one, and one token
more; it takes longer by k rows. So a guess is checked while the tokens that it is expected to bring, for
each millisecond of its row, are more than what the step brings without it. In a large batch, where rows are
all that a step costs, that leaves nothing: speculation turns itself down.
Source of the idea: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding".
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping

from tiny_llm.data import Advance, Drafter, Sequence
from tiny_llm.scheduler.speed import StepTime

MOST_DRAFTED = 16
"""Guesses of one sequence in a step."""
_PRIOR = 0.6  # of guesses are right, before any is known
_DRIFT = 0.02  # towards that goes what is believed, while nothing is checked: so it is tried again
_NEWS = 0.15  # of what is believed comes from the latest guess


class Acceptance:
    """How often the guesses about one sequence are right.

    ``guess`` is one that nobody has checked yet, ``source`` where the latest ones came from.
    """

    __slots__ = ("guess", "share", "source")

    def __init__(self) -> None:
        self.share = _PRIOR
        self.guess = -1
        self.source = ""

    def observe(self, drafted: int, accepted: int) -> None:
        """Of ``drafted`` guesses the first ``accepted`` were right, the next was not; more is not known."""
        for _ in range(accepted):
            self.share += _NEWS * (1 - self.share)
        if accepted < drafted:
            self.share -= _NEWS * self.share

    def compare(self, token: int) -> None:
        """The token came that was guessed, or another: known without a row of its own."""
        if self.guess >= 0:
            self.observe(1, int(token == self.guess))
            self.guess = -1


class Worth:
    """A step of ``decodes`` sequences with ``context`` tokens, to which guesses are added while they pay."""

    def __init__(self, speed: StepTime, decodes: int, context: int) -> None:
        self._tokens = float(decodes)
        self._ms = speed.decode_ms(decodes, context)
        self._row_ms = speed.row_ms()

    def length(self, share: float, most: int) -> int:
        """How many guesses of a sequence are worth their rows, where ``share`` of them are right."""
        chance, count = share, 0
        while count < most and chance * self._ms > self._tokens * self._row_ms:
            self._tokens += chance
            self._ms += self._row_ms
            chance *= share
            count += 1
        return count


class Speculation:
    """What ``sources`` guess, the first that has an idea, and how well.

    By source: ``drafted`` guesses were checked, ``accepted`` of them were right.
    """

    def __init__(self, sources: Mapping[str, Drafter]) -> None:
        self.drafted, self.accepted = Counter(dict.fromkeys(sources, 0)), Counter(dict.fromkeys(sources, 0))
        self._sources = sources

    def draft(self, seq: Sequence, known: Acceptance, worth: Worth, most: int) -> array[int]:
        """Guesses of ``seq``'s next tokens that are worth checking in a step, at most ``most``."""
        draft = self._guesses(seq, known, max(1, min(most, MOST_DRAFTED)))
        return draft[: worth.length(known.share, min(most, len(draft)))]

    def is_expected(self, seq: Sequence, known: Acceptance, worth: Worth) -> bool:
        """Whether, behind the token that is being drawn, a guess will be worth checking.

        Which token is expected to come is noted, so that it shows how good such guesses are.
        """
        draft = self._guesses(seq, known, 2)
        return len(draft) == 2 and worth.length(known.share, 1) == 1

    def count(self, known: Acceptance, drafted: int, advance: Advance) -> None:
        """See how good guesses were: the ``drafted`` ones of a step, or one that was only noted."""
        if drafted <= 0:
            for token in advance.tokens:
                known.compare(token)
            known.share += _DRIFT * max(0.0, _PRIOR - known.share)
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
