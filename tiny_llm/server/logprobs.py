"""Owns log-probabilities as JSON, in each interface's form.

An answer may have half a million of them. They are written as text at once, without values between that
would have to be made, looked through and collected; what never changes of a token is written once.
A row has the chosen token first, then the likeliest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from math import isfinite, isnan

from tiny_llm.server.answers import WrittenArray, dumps
from tiny_llm.tokenizer.places import TokenPlaces
from tiny_llm.tokenizer.tokenizer import Tokenizer

Row = Mapping[int, float]
_LEAST = -9999.0  # JSON has no infinity


class LogprobWriter:
    """Writes those of one answer or more, with the ``count`` likeliest of each row."""

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        self._count = count
        self._name = cache(lambda token: dumps(token_text(tokenizer, token)).decode())
        self._around = cache(partial(_around, tokenizer))

    def chat(self, rows: Sequence[Row]) -> WrittenArray:
        """Each token as the chat API has it."""
        return WrittenArray(lambda: map(self._chat_row, rows))

    def completion(self, rows: Sequence[Row], places: TokenPlaces) -> dict[str, WrittenArray]:
        """Tokens as /v1/completions has them; ``places`` are theirs in the text, to be taken once.

        What is NaN is not known, and told as null.
        """
        chosen = [next(iter(row)) for row in rows]
        return {
            "text_offset": WrittenArray(lambda: (str(places.take(token)) for token in chosen)),
            "token_logprobs": WrittenArray(lambda: (_chosen_number(row) for row in rows)),
            "tokens": WrittenArray(lambda: map(self._name, chosen)),
            "top_logprobs": WrittenArray(lambda: map(self._top, rows)),
        }

    def _chat_row(self, row: Row) -> str:
        top = "},".join([self._entry(token, row[token]) for token in self._likeliest(row)])
        chosen = next(iter(row))
        end = "}" if top else ""
        return f'{self._entry(chosen, row[chosen])},"top_logprobs":[{top}{end}]}}'

    def _entry(self, token: int, value: float) -> str:
        """What the chat API says of a token, without the brace at its end."""
        before, after = self._around(token)
        return f"{before}{_number(value)}{after}"

    def _top(self, row: Row) -> str:
        """The likeliest tokens of a row, and the chosen one even where others are likelier."""
        chosen = next(iter(row))
        if isnan(row[chosen]):
            return "null"
        listed = {self._name(token): row[token] for token in [*self._likeliest(row), chosen]}
        return "{" + ",".join([f"{name}:{_number(value)}" for name, value in listed.items()]) + "}"

    def _likeliest(self, row: Row) -> list[int]:
        return sorted(row, key=row.__getitem__, reverse=True)[: self._count]


def _around(tokenizer: Tokenizer, token: int) -> tuple[str, str]:
    """What stands around a token's number in a chat."""
    data = tokenizer.token_bytes(token)
    name = dumps(data.decode("utf-8", "replace")).decode()
    return f'{{"token":{name},"logprob":', f',"bytes":{dumps(list(data)).decode()}'


def by_id(rows: Sequence[Row]) -> WrittenArray:
    """Rows by token id: JSON's keys are strings."""
    return WrittenArray(
        lambda: (
            "{" + ",".join([f'"{token}":{_number(value)}' for token, value in row.items()]) + "}"
            for row in rows
        )
    )


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token by itself; one that is no whole character is told by its bytes, as OpenAI does."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _chosen_number(row: Row) -> str:
    value = next(iter(row.values()))
    return "null" if isnan(value) else _number(value)


def _number(value: float) -> str:
    """A log-probability as JSON can carry it."""
    return repr(round(value, 6) if isfinite(value) else _LEAST)
