"""Owns when an answer ends and which of its text may be shown; it knows no model.

Text is made as tokens arrive because a stop string, which may begin in one token and
end in another, ends the answer. Text that could still turn out to be the beginning of
a stop string is held back, so no part of one is ever shown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from copy import copy, deepcopy

from tiny_llm.data import FinishReason
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.tokenizer.detokenizer import StreamDetokenizer


class StopChecker:
    """One answer's tokens in, printable text out, and why the answer ended.

    It ends with "stop" at a token of ``end_ids`` (unless ``params.ignore_eos``), at one of
    ``params.stop_token_ids``, and where a stop string is complete; with "length" at
    ``params.max_tokens``. Of several stop strings the one that is complete first counts; of
    those complete at the same character, the longest. What the first ``params.min_tokens``
    tokens say is shown whatever it is: stop strings are looked for behind it. What ``params.stopping``
    made is told all that is shown, and ends it with "stop" where it says so.

    ``num_tokens`` counts every token, the ending one included. ``text`` has neither the ending token's
    text nor the stop string's; ``shown_tokens`` counts the tokens that it has, in part at least.
    """

    def __init__(
        self, detokenizer: StreamDetokenizer, params: SamplingParams, end_ids: Collection[int]
    ) -> None:
        self.num_tokens = 0
        self.shown_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None  # that ended it
        self._detokenizer = detokenizer
        self._stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else end_ids)}
        self._stops = params.stop
        self._is_over = params.stopping() if params.stopping else None
        self._min_tokens = params.min_tokens
        self._limit = params.max_tokens
        self._pieces: list[str] = []
        self._held = ""
        self._length = 0  # characters made so far, held ones included
        self._held_starts: deque[int] = deque()  # where the text of each token begins that is not shown yet

    @property
    def text(self) -> str:
        """What has been shown so far: all pieces that ``push`` returned, joined."""
        return "".join(self._pieces)

    def copy(self) -> StopChecker:
        """A checker that has seen the same, and goes its own way from here."""
        other = copy(self)
        other._detokenizer = self._detokenizer.copy()
        other._pieces = self._pieces.copy()
        other._held_starts = self._held_starts.copy()
        other._is_over = deepcopy(self._is_over)
        return other

    def push(self, token_id: int) -> str:
        """Add the next token; return the text that may now be shown, perhaps ""."""
        assert self.finish_reason is None, "the answer has ended"
        self.num_tokens += 1
        if token_id in self._stop_ids:
            piece = self._end("stop")
        else:
            if self._stops:
                self._held_starts.append(self._length)
            piece = self._release(self._detokenizer.push(token_id))
            if self.finish_reason is None and self.num_tokens == self._limit:
                piece += self._end("length")
        self._pieces.append(piece)
        if self._stops:
            self._count_shown()
        elif self.finish_reason != "stop":
            self.shown_tokens += 1
        if self._is_over is not None and self._is_over(piece) and self.finish_reason is None:
            self.finish_reason = "stop"
        return piece

    def _end(self, reason: FinishReason) -> str:
        piece = self._release(self._detokenizer.finish())
        if self.finish_reason is None:  # else the last characters completed a stop string
            self.finish_reason = reason
            piece += self._held
            self._held = ""
        return piece

    def _release(self, new: str) -> str:
        self._length += len(new)
        if not self._stops or self.num_tokens <= self._min_tokens:
            return new
        text = self._held + new
        shown = find_stop(text, self._stops)
        if shown is not None:
            self.finish_reason = "stop"
            self.stop_string = max((s for s in self._stops if text.startswith(s, shown)), key=len)
        else:
            shown = len(text) - open_length(text, self._stops)
        self._held = text[shown:]
        return text[:shown]

    def _count_shown(self) -> None:
        """Tokens whose text begins before what is held back. With nothing held, all of them."""
        end = self._length - len(self._held)
        starts = self._held_starts
        while starts and (starts[0] < end or not self._held):
            starts.popleft()
            self.shown_tokens += 1


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first in ``text``, or None."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def open_length(text: str, stops: Sequence[str]) -> int:
    """How many last characters of ``text`` may be the beginning of a stop string."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    for length in range(longest, 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
