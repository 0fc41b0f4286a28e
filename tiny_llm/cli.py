"""Owns the command line: arguments in, one call, an exit code out.

Exit codes: 0 done; 2 something that the user can mend, and one line on stderr says what;
1 a bug of ours; 130 stopped by Ctrl-C; 141 the reader of our pipe went away.
Knows no array, and no command's options: a command's module is imported when it is called.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from typer.core import TyperGroup

from tiny_llm.errors import ConfigError, TinyLLMError
from tiny_llm.options import command_app
from tiny_llm.version import __version__

EXAMPLES = """
[b]{program}[/b] · chat with the bundled model

[b]{program} chat --help[/b] · the options of a chat, which need no command's name: it is the default

[b]{program} --model qwen2-1.5b --quantize 4[/b] · with a larger one, downloaded once

[b]{program} generate --prompt "What is a KV cache?"[/b] · one answer

[b]{program} generate --prompt "Hi" --json[/b] · answer and figures, on one line

[b]{program} embed "a fox" "a wolf" "a block table"[/b] · vectors of texts, and how alike they are

[b]{program} bench --model qwen2-0.5b --load-format dummy --quantize 4[/b] · how fast it would be here

[b]echo "12 + 30 = ?" | {program}[/b] · the answer alone, for pipes
"""


COMMANDS: Mapping[str, tuple[str, str]] = {
    "chat": ("tiny_llm.commands.chat", "Talk with a model ([b]the default command[/b])."),
    "generate": ("tiny_llm.commands.generate", "Answer one prompt, or each of a file's."),
    "embed": ("tiny_llm.commands.embed", "Turn texts into vectors, and show how alike they are."),
    "serve": ("tiny_llm.commands.serve", "Serve a model over HTTP, as OpenAI's clients expect it."),
    "agent": ("tiny_llm.commands.agent", "Do a task in a folder by a model's actions, as you allow them."),
    "follow": ("tiny_llm.commands.follow", "Share a model with a process on another machine."),
    "bench": ("tiny_llm.commands.bench", "Measure how fast a model answers."),
    "models": (
        "tiny_llm.commands.models",
        "List the short names: hub id, parameters, download size, and whether it is on disk.",
    ),
    "course": (
        "book.course.commands",
        "Build this runtime yourself: list, start, check, hint, diff, solution, break.",
    ),
    "memory": (
        "tiny_llm.planning.commands",
        "Say how much memory a model takes, and how far this machine's reaches; nothing is loaded.",
    ),
    "simulate": (
        "tiny_llm.commands.simulate",
        "Try policies of serving on a trace or a made-up load: the real scheduler, no model.",
    ),
    "doctor": (
        "tiny_llm.planning.doctor",
        "Say which backends this machine has, and where our kernels or MLX's own run.",
    ),
}
"""Each command's module, imported when it is called, and its line in the help."""


class _ChatByDefault(TyperGroup):
    """Without a command's name it is ``chat``: ``main.py --model X`` is ``main.py chat --model X``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        own = {*ctx.help_option_names, "--version"}
        if not args or (args[0].startswith("-") and args[0] not in own):
            args = ["chat", *args]
        return super().parse_args(ctx, args)


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"tiny_llm {__version__}")
        raise typer.Exit


def _before_any(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None: ...


def _passing_on(module: str) -> Callable[[typer.Context], None]:
    """A command that passes its arguments on as they are, --help too, to the ``app`` of ``module``."""

    def run(context: typer.Context) -> None:
        command = typer.main.get_command(_module(module).app)
        with command.make_context(context.command_path, context.args) as inner:
            command.invoke(inner)

    return run


def _module(name: str) -> ModuleType:
    """Import ``name``. Raises ConfigError if it is of the course, which is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "book":
            raise
        raise ConfigError("The course needs a checkout of tiny_llm; this is none. Run it there.") from error


def _app() -> typer.Typer:
    told = "A language model on your own machine: chat with it, or ask it one thing."
    made = command_app(cls=_ChatByDefault, help=told)
    made.callback()(_before_any)
    as_they_are = {"ignore_unknown_options": True, "allow_extra_args": True}
    for name, (module, help) in COMMANDS.items():
        command = made.command(name, help=help, add_help_option=False, context_settings=as_they_are)
        command(_passing_on(module))
    return made


app = _app()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: the process's) and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _open_what_is_closed()
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit; there must be somewhere to flush it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except typer.TyperException as error:  # a mistake in the arguments
        return _fail(error, error.format_message(), 2, arguments)
    except (TinyLLMError, OSError) as error:  # OSError: a full disk, a file without permission
        return _fail(error, str(error), 2, arguments)
    except Exception as error:
        what = f"{type(error).__name__}: {error} (this is a bug; --debug shows where)"
        return _fail(error, what, 1, arguments)


def _open_what_is_closed() -> None:
    """A closed stdin, stdout or stderr becomes /dev/null, lest a file with weights takes its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the process ends


def _run(arguments: list[str]) -> int:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the tokenizer says what is wrong with a line
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? and goes on
    if "--course" in arguments:
        _module("book.course.restart").restart_with_learner(arguments)
    called = Path(sys.argv[0]).name
    name = {"main.py": "python main.py", "__main__.py": "python -m tiny_llm"}.get(called, called)
    command = typer.main.get_command(app)
    command.epilog = EXAMPLES.format(program=name)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            with command.make_context(name, arguments) as context:
                command.invoke(context)
    except typer.Exit as done:  # --help
        return done.exit_code
    finally:
        sys.stdout.flush()
    return 0


def _fail(error: Exception, what: str, code: int, arguments: list[str]) -> int:
    if "--debug" in arguments:
        traceback.print_exception(error)
    print(f"error: {' '.join(what.split())}", file=sys.stderr)
    return code
