"""Owns the terminal: what a person types, pasted lines and what comes too early included; where lines break.

A streamed answer's break between words, as a terminal would not do it. What must be copied as it is (fenced
code, rows of a table) is left to the terminal to break, which remembers that it was one line.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import unicodedata
from collections.abc import Callable, Iterator

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


TAB = 8
FENCES = ("```", "~~~")


class Wrapper:
    """Text in pieces in, the same text with line breaks for ``columns()`` columns out.

    A word is held back until it has ended, so that none needs to be taken back; ``end`` gives the last.
    Blanks where a line ends are dropped. The result does not depend on how the text was cut.
    """

    def __init__(self, columns: Callable[[], int]) -> None:
        self._columns = columns
        self._column = 0
        self._line = ""
        self._blanks = ""
        self._word = ""
        self._too_long = False
        self._in_code = False

    def feed(self, text: str) -> str:
        """What can be shown now."""
        return "".join(self._take(char) for char in map(_visible, text) if char)

    def end(self) -> str:
        """What was held back; the next text begins a line of its own."""
        shown = self._placed()
        self._end_line()
        self._in_code = False
        return shown

    def _take(self, char: str) -> str:
        if char == "\n":
            shown = self._placed()
            self._end_line()
            return shown + "\n"
        self._line += char
        if self._in_code or self._line.startswith("|"):
            return char
        if char in " \t":
            shown = self._placed()
            self._blanks += char
            return shown
        return self._letter(char)

    def _letter(self, char: str) -> str:
        if self._too_long:
            self._column += width(char)
            return char
        if width(char) == 2:  # a line may break before and after it
            shown = self._placed()
            self._word = char
            return shown + self._placed()
        self._word += char
        if width(self._word) < self._columns():
            return ""
        shown = self._placed()
        self._too_long = True  # for a row: the terminal breaks it, and a copy of it is whole
        return shown

    def _placed(self) -> str:
        """The word held back, on this row or on the next."""
        self._too_long = False
        if not self._word:
            return ""
        columns = max(1, self._columns())
        if self._column > columns:  # the terminal went on in the next row
            self._column = self._column % columns or columns
        shown = self._blanks + self._word
        end = self._column + width(shown)
        if self._column and end > columns:
            shown, end = "\n" + self._word, width(self._word)
        self._column = end
        self._blanks = self._word = ""
        return shown

    def _end_line(self) -> None:
        if self._line.lstrip().startswith(FENCES):
            self._in_code = not self._in_code
        self._line = self._blanks = ""
        self._column = 0


def width(text: str) -> int:
    """Columns that a terminal gives to ``text``."""
    return sum(map(_columns_of, text))


def _columns_of(char: str) -> int:
    if char == "\t":
        return TAB
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _visible(char: str) -> str:
    """A control character as its picture: an answer must not steer the terminal."""
    if char == "\r":
        return ""
    if char in "\n\t" or unicodedata.category(char) != "Cc":
        return char
    return chr(0x2400 + ord(char)) if ord(char) < 0x20 else "\ufffd"
