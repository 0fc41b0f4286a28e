"""Owns where in a text each of its tokens begins: what a token adds lies from its place to the next one's.

Counted in characters. A token that ends within a character adds nothing yet; the one that ends it adds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tiny_llm.tokenizer.detokenizer import StreamDetokenizer


def places_of(spans: Sequence[tuple[int, int]]) -> list[int]:
    """The places of a text's tokens, by the ``spans`` (first, end) that the encoder took them from.

    A span may lack the spaces before its token, and tokens that the encoder added have an empty one.
    """
    places: list[int] = []
    place = reached = 0
    for first, end in spans:
        is_added = first == end
        place = reached if is_added else max(place, min(first, reached))
        reached = max(reached, end)
        places.append(place)
    return places


class TokenPlaces:
    """The places of tokens as they come; the first ones may be ``known``, as those of a prompt are.

    ``stream`` is the text's detokenizer, and ``begin`` where in the whole its text begins.
    """

    def __init__(self, stream: StreamDetokenizer, begin: int = 0, known: Iterable[int] = ()) -> None:
        self._stream = stream
        self._certain = self._place = begin
        self._known = iter(known)

    def take(self, token_id: int) -> int:
        """The place of the next token."""
        known = next(self._known, None)
        if known is not None:
            return known
        place = self._place
        self._certain += len(self._stream.push(token_id))
        # Of an unfinished character nothing is there yet.
        held = self._stream.copy().finish().rstrip("\ufffd")
        self._place = max(place, self._certain + len(held))
        return place
