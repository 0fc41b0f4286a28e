"""Owns the check of a number that an operator may set: whole or not, in its range, never NaN.

The error has the setting's name as it is given here, which is to have the command's option beside it.
"""

from __future__ import annotations

from math import inf

from tiny_llm.errors import ConfigError

MOST = 10**9  # counts and seconds beyond it are a mistake; two of them added still fit an integer of 32 bits


def check_whole(name: str, given: object, *, least: int = 1, most: int = MOST) -> None:
    """Raise ConfigError if ``given`` is no whole number from ``least`` to ``most``."""
    if not isinstance(given, int) or isinstance(given, bool) or not least <= given <= most:
        raise ConfigError(f"{name} is {given!r}, but must be a whole number from {least} to {most}.")


def check_number(name: str, given: object, *, zero: bool = False, most: float = MOST) -> None:
    """Raise ConfigError if ``given`` is no number from 0 to ``most``, or is 0 and ``zero`` is not allowed."""
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not is_number or not 0 <= given <= most or (given == 0 and not zero):  # type: ignore[operator]
        low = "from 0" if zero else "above 0"
        high = "" if most == inf else f"{' to' if zero else ' and at most'} {most:g}"
        raise ConfigError(f"{name} is {given!r}, but must be a number {low}{high}.")
