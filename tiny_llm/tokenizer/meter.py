"""What one render of a chat template may use: seconds of its thread, and characters or elements.

Time is looked at wherever a template can repeat itself; a size is worked out before
the one call that could make something huge, because nothing can interrupt such a call.
Owns the limits. Refuses to know jinja.
"""

from __future__ import annotations

import copy
import re
import string
import sys
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Sequence, ValuesView
from operator import length_hint
from typing import NoReturn, TypeVar, cast

from tiny_llm.errors import RequestError

_T = TypeVar("_T")

SIZE = 2**22  # largest single value: characters, an element of a list counting as 16. The same for the text
_ELEMENT = 16
_MEMORY = 64 * SIZE  # bytes made in one render, kept or not
_GROWTH = 8 * SIZE  # bound on (how often) x (how much) of one call
_INT_BITS = 2**14  # just over the 4,300 digits that Python prints
_GROUPS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
_ONE_SHOT: type = type(iter(()))
# Filters that run Python code for each element, in one call; a text's elements are its characters.
_ELEMENTWISE = frozenset(
    {"batch", "groupby", "join", "map", "max", "min", "reject", "rejectattr", "select", "selectattr"}
    | {"slice", "sort", "sum", "unique"}
)
_NUMBER = re.compile(r"\d+")
_STAR_WIDTH = re.compile(r"%[^%a-zA-Z]*\*")


class Meter:
    """One render's allowance. Every method raises RequestError once it is used up."""

    def __init__(self, seconds: float) -> None:
        """Start the clock."""
        self._seconds = seconds
        self._deadline = time.thread_time() + seconds  # of this thread: a busy machine stops no render
        self._memory = 0

    def tick(self) -> None:
        """Look at the thread's clock."""
        if time.thread_time() > self._deadline:
            raise RequestError(
                f"The model's chat template was stopped after {self._seconds:g} s. It repeats itself without "
                f"end, or the conversation is too long for it."
            )

    def each(self, items: Iterable[_T]) -> Iterator[_T]:
        """Yield ``items``, with a look at the clock before each."""
        for item in items:
            self.tick()
            yield item

    def made(self, value: _T) -> _T:
        """Charge for a value that the template made, and return it."""
        self.tick()
        self._memory += sys.getsizeof(value)
        if self._memory > _MEMORY or _weight(value) > SIZE:
            _too_large()
        return value

    def once(self, items: Iterator[_T]) -> Iterator[_T]:
        """Run a lazy iterator now, metered; like it, the result can be read once."""
        found: list[_T] = []
        for item in self.each(items):
            found.append(item)
            _check_size(len(found) * _ELEMENT)
        return iter(tuple(self.made(found)))

    def gather(self, pieces: Iterable[str]) -> str:
        """Join ``pieces``, stopping as soon as they are too much."""
        found, size = [], 0
        for piece in self.each(pieces):
            found.append(piece)
            size += len(piece)
            _check_size(size)
        return self.made("".join(found))

    def before_call(self, name: str, subject: object, args: Sequence[object]) -> None:
        """Refuse a filter or method of ``subject`` that could make something huge."""
        self.tick()
        if name == "%":
            return _check_percent(str(subject), args)
        if name in ("format", "format_map"):
            return _check_format(str(subject), args)
        numbers = [abs(arg) for arg in args if isinstance(arg, int)]
        _check_size(sum(numbers))  # center(10**10), batch(10**10) ...
        if name in _ELEMENTWISE and isinstance(subject, str):
            _check_size(_ELEMENT * len(subject))
        sizes = [_weight(arg) for arg in args if not isinstance(arg, int)]
        if name in _ELEMENTWISE:
            _check_growth(length_hint(subject), max(sizes, default=1))
        if name in ("indent", "replace"):  # of the text of anything
            _check_growth(_weight(subject), max(sizes + numbers, default=1))
        if name == "sum" and any(isinstance(arg, (list, tuple)) for arg in args):
            _check_growth(_weight(subject), _weight(subject))  # adding n lists copies n**2 elements

    def before_operator(self, operator: str, left: object, right: object) -> None:
        """Refuse arithmetic that could make something huge."""
        self.tick()
        for a, b in ((left, right), (right, left)):
            if operator == "*" and isinstance(a, (str, bytes, list, tuple)) and isinstance(b, int):
                _check_size(len(a) * b)
        if isinstance(left, (str, bytes)) and operator == "%":
            _check_percent(str(left), [right])
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            made = bits[0] * abs(right) if operator == "**" else sum(bits)
            if max(*bits, made) > _INT_BITS:
                _too_large()


def _check_percent(text: str, args: Sequence[object]) -> None:
    """``%`` makes at most: directives x the widest, whether by its argument or by a number in the text."""
    if _STAR_WIDTH.search(text):
        _too_large()
    _check_growth(text.count("%"), _widest(args, _NUMBER.findall(text)))


def _check_format(text: str, args: Sequence[object]) -> None:
    """``format`` makes as much as ``%``; a width inside a width is not allowed, as its size is not seen."""
    specs = [spec for _, _, spec, _ in string.Formatter().parse(text) if spec]
    if any("{" in spec for spec in specs):
        _too_large()
    _check_growth(text.count("{"), _widest(args, _NUMBER.findall(" ".join(specs))))


def _widest(args: Sequence[object], numbers: Sequence[str]) -> int:
    if max(map(len, numbers), default=0) > len(str(SIZE)):
        _too_large()
    return max([_weight(list(args)), *map(int, numbers)])


def _weight(value: object) -> int:
    """Characters and elements of a value, what is shared counted each time; only roughly beyond SIZE."""
    total, stack = 0, [value]
    while stack and total <= SIZE:
        item = stack.pop()
        if isinstance(item, (str, bytes)):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length() // 3 + 1
        elif isinstance(item, dict):
            total += 2 * _ELEMENT * len(item)
            stack += item.keys()
            stack += item.values()
        elif isinstance(item, _GROUPS):
            total += _ELEMENT * len(item)
            stack += item
        elif isinstance(item, range):
            total += _ELEMENT * len(item)
        elif isinstance(item, _ONE_SHOT):
            unread = cast("Iterator[object]", copy.copy(item))  # looking must not use it up
            stack.append(list(unread))
        else:
            total += _ELEMENT
    return total


def _check_growth(times: int, size: int) -> None:
    if times * size > _GROWTH:
        _too_large()


def _check_size(size: int) -> None:
    if size > SIZE:
        _too_large()


def _too_large() -> NoReturn:
    raise RequestError(
        f"The model's chat template was stopped: it makes a text or a list of more than {SIZE:,} characters, "
        f"or the conversation is too long for it."
    )
