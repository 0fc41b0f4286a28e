"""Owns how many tokens of a draft are worth checking: how often guesses were right, against what a row costs.

A step that checks k guesses of a sequence gives it the right ones before the first wrong one, and one token
more; it takes longer by k rows. So a guess is checked while the tokens that it is expected to bring, for
each millisecond of its row, are more than what the step brings without it. In a large batch, where rows are
all that a step costs, that leaves nothing: speculation turns itself down.
Source of the idea: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding".
"""

from __future__ import annotations

from dataclasses import dataclass

from tiny_llm.scheduler.speed import StepTime

_PRIOR = 0.6  # of guesses are right, before any is known
_DRIFT = 0.02  # towards that goes what is believed, while nothing is checked: so it is tried again
_NEWS = 0.15  # of what is believed comes from the latest guess


@dataclass(slots=True)
class Acceptance:
    """How often the guesses about one sequence are right.

    ``guess`` is one that nobody has checked yet, ``source`` where the latest ones came from.
    """

    share: float = _PRIOR
    guess: int = -1
    source: str = ""

    def observe(self, drafted: int, accepted: int) -> None:
        """Of ``drafted`` guesses the first ``accepted`` were right, the next was not; more is not known."""
        for _ in range(accepted):
            self.share += _NEWS * (1 - self.share)
        if accepted < drafted:
            self.share -= _NEWS * self.share

    def drift(self) -> None:
        """Nothing was checked."""
        self.share += _DRIFT * max(0.0, _PRIOR - self.share)

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
