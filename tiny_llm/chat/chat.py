"""Owns the interactive chat: what is typed in a terminal in, a streamed answer out.

What was said and what still fits is the Conversation's; how tokens come is the engine's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from tiny_llm.chat.conversation import Conversation
from tiny_llm.chat.terminal import Wrapper, prepare, read_message, typing_kept
from tiny_llm.data import Chunk, Completion
from tiny_llm.errors import TinyLLMError, did_you_mean
from tiny_llm.sampling_params import SamplingParams

HELP = """\
/system TEXT  tell the model how to behave (-: nothing; alone: show what it was told)
/retry        have the last question answered again
/reset        forget the conversation; the system message stays
/save FILE    write the conversation to a new JSON file
/load FILE    go on with a conversation that was saved
/help         this list
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer. The up arrow brings back what you typed. Lines pasted together are one message.
A message that begins like a command: type a space before it."""
SAME_AGAIN = "At temperature 0 the answer is the same again; --temperature 0.8 draws another."
COMMANDS = ("/system", "/retry", "/reset", "/save", "/load", "/help", "/exit")
LEAVE = re.compile(r"/(exit|quit)(?!\S)")
COMMAND = re.compile(r"/[A-Za-z]+(?!\S)")
"""What makes a line a command; ``/usr/bin`` and ``// TODO`` begin a message."""


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
        prepare()
        self._note(f"Talking to {self._name}. /help lists commands; Ctrl-C stops an answer, Ctrl-D leaves.")
        style = self._style
        # Readline must know which characters take no room: \x01 and \x02 enclose them.
        prompt = f"\x01{style.user}\x02> \x01{style.end}\x02" if style.user else "> "
        while True:
            try:
                typed = read_message(prompt)
                if LEAVE.match(typed):
                    return
                self._handle(typed)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # not during an answer: that one ends itself
                print()
                self._note("Ctrl-D or /exit leaves.")

    def _handle(self, typed: str) -> None:
        if COMMAND.match(typed):
            self._command(*typed.split(maxsplit=1))
        elif text := typed.strip():
            self._answer(lambda: self._conversation.ask(text, self._params))

    def _answer(self, ask: Callable[[], Generator[Chunk]]) -> None:
        """Show the answer that ``ask`` begins, until its end or Ctrl-C."""
        forgotten = self._conversation.forgotten
        try:
            with typing_kept(), contextlib.closing(ask()) as chunks:
                if dropped := self._conversation.forgotten - forgotten:
                    self._note(f"The oldest {dropped} messages no longer fit the context and were forgotten.")
                completion = self._show(chunks)
                if completion is not None:
                    self._note(figures(completion))
        except KeyboardInterrupt:
            self._note("Stopped.")
        except TinyLLMError as error:
            self._error(str(error))

    def _show(self, chunks: Generator[Chunk]) -> Completion | None:
        """Print the answer as it comes, its lines broken between words; the whole of it, if it ended."""
        wrapper, completion = Wrapper(_columns), None
        print(self._style.answer, end="", flush=True)
        try:
            for chunk in chunks:
                print(wrapper.feed(chunk.text), end="", flush=True)
                completion = chunk.completion
        finally:
            print(wrapper.end() + self._style.end)
        return completion

    def _command(self, name: str, rest: str = "") -> None:
        match name:
            case "/help":
                print(_wrapped(HELP))
            case "/reset":
                self._conversation.reset()
                self._note("The conversation is forgotten.")
            case "/retry":
                if not self._params.temperature:
                    self._note(SAME_AGAIN)
                self._answer(lambda: self._conversation.retry(self._params))
            case "/system" if rest.strip() == "-":
                self._conversation.system = None
                self._note("There is no system message from the next message on.")
            case "/system" if rest:
                self._conversation.system = rest
                self._note("From the next message on.")
            case "/system":
                self._note(self._conversation.system or "There is no system message.")
            case "/save" | "/load":
                self._file(name, rest.strip())
            case _:
                hint = "/help lists them; with a space before it, it is a message."
                self._error(f"there is no command {name}.{did_you_mean(name, COMMANDS)} {hint}")

    def _file(self, command: str, name: str) -> None:
        """Save the conversation to the file of that name, or go on with the one that it has."""
        chat = self._conversation
        act, what = (chat.save, "written") if command == "/save" else (chat.load, "read")
        if not name:
            self._error(f"{command} needs a file's name.")
            return
        try:
            act(Path(os.path.expanduser(name)))  # unlike Path's, never an error
        except FileExistsError:
            self._error(f"{name} exists already; choose another name.")
        except TinyLLMError as error:
            self._error(str(error))
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL
            self._error(f"{name} cannot be {what}: {getattr(error, 'strerror', error)}.")
        else:
            number = f"{len(chat.messages)} messages"
            self._note(f"Saved {number} to {name}." if what == "written" else f"Loaded {number} from {name}.")

    def _note(self, text: str) -> None:
        print(f"{self._style.dim}{_wrapped(text)}{self._style.end}")

    def _error(self, text: str) -> None:
        print(_wrapped(f"error: {text}"))


def _columns() -> int:
    return shutil.get_terminal_size().columns


def _wrapped(text: str) -> str:
    wrapper = Wrapper(_columns)
    return wrapper.feed(text) + wrapper.end()
