"""Owns what a person types: a message, pasted lines included, and what they type too early."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
from collections.abc import Iterator

try:  # absent on some builds; input() then has no history
    import readline
except ImportError:
    readline = None  # type: ignore[assignment]

PASTE_S = 0.03  # how long the rest of a paste may be on its way, where a terminal does not say what is pasted


def prepare() -> None:
    """Have GNU readline take for one text what a terminal says is pasted; Python turns that off."""
    is_gnu = readline is not None and "GNU" in (readline.__doc__ or "")
    if is_gnu and os.environ.get("TERM") != "dumb":
        readline.parse_and_bind("set enable-bracketed-paste on")


def read_message(prompt: str) -> str:
    """What is typed up to Enter, and all lines of a paste. Raises EOFError at the end of input.

    A line that comes at once after another one was pasted with it; after a command it is the next message.
    """
    lines = [input(prompt)]
    while not lines[0].startswith("/") and select.select([sys.stdin], [], [], PASTE_S)[0]:
        try:
            lines.append(input())
        except EOFError:  # Ctrl-D ends the message; typed again it ends the chat
            break
    return "\n".join(lines)


@contextlib.contextmanager
def typing_kept() -> Iterator[None]:
    """What is typed meanwhile is not shown now, but at the next prompt. Ctrl-C interrupts as ever."""
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    silent = list(before)
    silent[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(descriptor, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
