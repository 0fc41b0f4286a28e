"""Owns the way from a regular expression to a mask by hand: structured_output.py's lesson, and its oracle.

A pattern has characters, ``\\`` before a sign, classes as ``[a-z_]``, groups, ``|``, ``*``, ``+`` and ``?``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tiny_llm.sampling_params import Constraint

_SIGN = re.compile(r"\[(?:\\.|[^][\\])+\]|\\.|.", re.S)
_REPEATS, _UNKNOWN = "*+?", "[].^$)\\{}"

Item: TypeAlias = "frozenset[int] | OneOf | Star"  # a set of bytes stands for one byte of it
Rest: TypeAlias = "tuple[Item, ...]"  # what is left of a pattern: items, one behind the other
State: TypeAlias = "frozenset[Rest]"
"""All that may be left at a place: each begins with a set of bytes, or is (), where the text may end."""


@dataclass(frozen=True, slots=True)
class OneOf:
    """An item: one of ``options``."""

    options: tuple[Rest, ...]


@dataclass(frozen=True, slots=True)
class Star:
    """An item: ``body`` any number of times."""

    body: Rest


def parsed(pattern: str) -> Rest:
    """What matches ``pattern``. Raises ValueError for one with more in it than this module knows."""
    groups: list[list[Rest]] = [[()]]  # those that are open, each with its options so far
    before = "("
    for sign in _SIGN.findall(pattern):
        options = groups[-1]
        if sign in _REPEATS and before not in ("(", "|", *_REPEATS):
            options[-1] = repeated(options[-1], sign)
        elif sign == "(":
            groups.append([()])
        elif sign == "|":
            options.append(())
        elif sign == ")" and len(groups) > 1:
            groups.pop()
            groups[-1][-1] += (OneOf(tuple(options)),)
        elif sign in (*_REPEATS, *_UNKNOWN) or sign[:2] == "[^" or re.search(r"\\\w", sign):
            raise ValueError(f"{sign!r} is not known here, in {pattern!r}.")
        else:
            options[-1] += (_characters(sign),)
        before = sign
    if len(groups) > 1:
        raise ValueError(f"A group does not end in {pattern!r}.")
    return (OneOf(tuple(groups[0])),)


def _characters(sign: str) -> Item:
    """A character, or one of a class: all that are one byte make one set."""
    ranges = re.findall(r"(\\.|.)(?:-(\\.|.))?", sign[1:-1] if len(sign) > 2 else sign, re.S)
    spans = [range(ord(first[-1]), ord((last or first)[-1]) + 1) for first, last in ranges]
    if not all(spans):
        raise ValueError(f"{sign} has a range whose end is before its beginning.")
    codes = {code for span in spans for code in span}
    longer = [tuple(frozenset([byte]) for byte in chr(code).encode()) for code in codes if code > 127]
    short = frozenset(code for code in codes if code <= 127)
    return OneOf(((short,), *longer) if short else tuple(longer)) if longer else short


def repeated(rest: Rest, sign: str) -> Rest:
    """``rest`` with its last item any number of times (``*``), at least once (``+``), or perhaps (``?``)."""
    *before, last = rest
    match sign:
        case "*":
            return (*before, Star((last,)))
        case "+":
            return (*rest, Star((last,)))
        case _:
            return (*before, OneOf(((last,), ())))


def opened(rests: Iterable[Rest]) -> State:
    """What may be left if one of ``rests`` is: choices taken in each way, stars entered and passed by."""
    seen: set[Rest] = set()
    left = list(rests)
    while left:
        rest = left.pop()
        if rest in seen:
            continue
        seen.add(rest)
        match rest[:1]:
            case (OneOf(options),):
                left += [option + rest[1:] for option in options]
            case (Star(body),):
                left += [rest[1:], body + rest]
    return frozenset(rest for rest in seen if not rest or isinstance(rest[0], frozenset))


def after(state: State, data: bytes) -> State:
    """What is left behind ``data``; nothing, not even (), if it cannot come."""
    for byte in data:
        state = opened(rest[1:] for rest in state if rest and byte in rest[0])  # type: ignore[operator]
        if not state:
            break
    return state


def mask_ref(state: State, vocabulary: Sequence[bytes], end_ids: Collection[int]) -> bytes:
    """A byte a token: 255 for those that can come next, 0 for others. The text may end by any of ``end_ids``.

    ``vocabulary`` has each token's bytes; none for those that are no text.
    """
    mask = bytearray(255 if token and after(state, token) else 0 for token in vocabulary)
    for end in end_ids:
        mask[end] = 255 if () in state else 0
    return bytes(mask)


def constraint_ref(
    pattern: str, vocabulary: Sequence[bytes], end_ids: Collection[int]
) -> Callable[[], Constraint]:
    """A ``SamplingParams.constraint``: answers that ``pattern`` matches. A mask is made once a state."""
    start = opened([parsed(pattern)])
    kept: dict[State, bytes] = {}

    def allowed(tokens: list[int]) -> bytes:
        state = after(start, b"".join(vocabulary[token] for token in tokens))
        if state not in kept:
            kept[state] = mask_ref(state, vocabulary, end_ids)
        return kept[state]

    return lambda: allowed
