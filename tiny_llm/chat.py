"""Owns the interactive chat: lines typed in a terminal in, a streamed answer out.

What was said and what still fits is the Conversation's; how tokens come is the engine's.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tiny_llm.data import Completion
from tiny_llm.engine.conversation import Conversation
from tiny_llm.errors import TinyLLMError, did_you_mean
from tiny_llm.sampling_params import SamplingParams

with contextlib.suppress(ImportError):  # absent on some builds; input() then has no history
    import readline  # noqa: F401

HELP = """\
/system TEXT  tell the model how to behave (alone: show what it was told)
/reset        forget the conversation; the system message stays
/save FILE    write the conversation to a new JSON file
/help         this list
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer. The up arrow brings back what you typed."""
COMMANDS = ("/system", "/reset", "/save", "/help", "/exit")


@dataclass(frozen=True, slots=True)
class Style:
    """Escape sequences around a piece of text; empty ones where colours are not wanted."""

    user: str = ""
    answer: str = ""
    dim: str = ""
    end: str = ""

    @classmethod
    def for_terminal(cls) -> Style:
        """Colours if stdout is a terminal that has them and NO_COLOR is not set (no-color.org)."""
        plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return cls() if plain else cls("\x1b[1;32m", "\x1b[36m", "\x1b[2m", "\x1b[0m")


def figures(completion: Completion) -> str:
    """One line for people: how many tokens, how fast."""
    t = completion.timing
    speed = f" · {t.decode_tok_s:.1f} tok/s" if t.decode_tok_s else ""
    cut = " · cut at the limit" if completion.finish_reason == "length" else ""
    counts = f"{t.prompt_tokens} prompt + {t.completion_tokens} answer tokens"
    return f"{counts} · first after {t.ttft_s:.2f} s{speed}{cut}"


class Chat:
    """One interactive session on stdin and stdout."""

    def __init__(self, name: str, conversation: Conversation, params: SamplingParams) -> None:
        self._name = name
        self._conversation = conversation
        self._params = params
        self._style = Style.for_terminal()

    def run(self) -> None:
        """Talk until Ctrl-D or /exit. Nothing that a user types ends the session otherwise."""
        self._note(f"Talking to {self._name}. /help lists commands; Ctrl-C stops an answer, Ctrl-D leaves.")
        while True:
            try:
                line = self._read()
                if line is None or line.split()[:1] in (["/exit"], ["/quit"]):
                    return
                self._handle(line)
            except KeyboardInterrupt:  # not during an answer: that one ends itself
                print()
                self._note("Ctrl-D or /exit leaves.")

    def _read(self) -> str | None:
        """The next line; None at the end of input."""
        try:
            return input(self._prompt()).strip()
        except EOFError:
            print()
            return None

    def _handle(self, line: str) -> None:
        if line.startswith("/"):
            self._command(*line.split(maxsplit=1))
        elif line:
            self._answer(line)

    def _prompt(self) -> str:
        """Readline must know which characters take no room: \\x01 and \\x02 enclose them."""
        style = self._style
        return f"\x01{style.user}\x02> \x01{style.end}\x02" if style.user else "> "

    def _answer(self, text: str) -> None:
        forgotten = self._conversation.forgotten
        try:
            chunks = self._conversation.ask(text, self._params)
            if dropped := self._conversation.forgotten - forgotten:
                self._note(f"The oldest {dropped} messages no longer fit the context and were forgotten.")
            with contextlib.closing(chunks):
                print(self._style.answer, end="", flush=True)
                for chunk in chunks:
                    print(chunk.text, end="", flush=True)
                    if chunk.completion is not None:
                        print(self._style.end)
                        self._note(figures(chunk.completion))
        except KeyboardInterrupt:
            print(self._style.end)
            self._note("Stopped.")
        except TinyLLMError as error:
            self._error(str(error))

    def _command(self, name: str, rest: str = "") -> None:
        match name:
            case "/help":
                print(HELP)
            case "/reset":
                self._conversation.reset()
                self._note("The conversation is forgotten.")
            case "/system" if rest:
                self._conversation.system = rest
                self._note("From the next message on.")
            case "/system":
                self._note(self._conversation.system or "There is no system message.")
            case "/save":
                self._save(rest)
            case _:
                self._error(f"there is no command {name}.{did_you_mean(name, COMMANDS)} /help lists them.")

    def _save(self, name: str) -> None:
        if not name:
            self._error("/save needs a file's name.")
            return
        try:
            self._conversation.save(Path(os.path.expanduser(name)))  # unlike Path's, never an error
        except FileExistsError:
            self._error(f"{name} exists already; choose another name.")
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL
            self._error(f"{name} cannot be written: {getattr(error, 'strerror', error)}.")
        else:
            self._note(f"Saved {len(self._conversation.messages)} messages to {name}.")

    def _note(self, text: str) -> None:
        print(f"{self._style.dim}{text}{self._style.end}")

    def _error(self, text: str) -> None:
        print(f"error: {text}")
