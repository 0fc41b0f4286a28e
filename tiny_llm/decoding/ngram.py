"""Owns guesses without a model: a text that repeats itself goes on as it did the last time.

Where the sequence's latest tokens stand in what may be repeated, that is the sequence itself or the answer
that the caller predicts, the tokens behind that place are the draft. A miss needs no care: the next place is
looked for as the first was. Source of the idea: Saxena 2023, prompt lookup decoding.
"""

from __future__ import annotations

from array import array

from tiny_llm.data import Sequence

_WIDTH = 3  # tokens that must agree
_PLACES = 16  # that are compared, the latest first
_LONGEST = 32  # tokens that are compared of each
_START = array("i", [-1] * _WIDTH)  # before an answer: no token has these ids


def predicted_draft(seq: Sequence, most: int) -> array[int]:
    """Up to ``most`` tokens that come next in ``seq`` if the caller's prediction is right there."""
    if not seq.params.prediction:
        return array("i")
    predicted = _START + array("i", seq.params.prediction)
    place = _place(predicted, _START + seq.tokens[seq.prompt_len :])
    return array("i") if place is None else predicted[place : place + most]


def ngram_draft(seq: Sequence, most: int) -> array[int]:
    """Up to ``most`` tokens that may come next in ``seq``; none where nothing alike came before."""
    place = _place(seq.tokens, seq.tokens)
    if place is None:
        return array("i")
    period = len(seq.tokens) - place  # what is repeated may reach into the draft
    return array("i", [seq.tokens[place + i % period] for i in range(most)])


def _place(text: array[int], tail: array[int]) -> int | None:
    """Where ``text`` goes on behind what agrees longest with the end of ``tail``; the last of equals."""
    if len(tail) < _WIDTH:
        return None
    size = text.itemsize
    data, wanted = text.tobytes(), tail[-_WIDTH:].tobytes()
    found, longest, end = None, 0, len(data) - size  # at its end nothing goes on
    for _ in range(_PLACES):
        at = data.rfind(wanted, 0, end)
        if at < 0:
            break
        end = at + len(wanted) - 1
        if at % size:
            continue
        place = at // size + _WIDTH
        length = _agreeing(text, place, tail)
        if length > longest:
            found, longest = place, length
    return found


def _agreeing(text: array[int], place: int, tail: array[int]) -> int:
    """How many tokens before ``place`` are those at the end of ``tail``."""
    most = min(place, len(tail), _LONGEST)
    return next((n for n in range(most) if text[place - 1 - n] != tail[-1 - n]), most)
