"""Owns the command line: arguments in, one call, an exit code out.

Exit codes: 0 done; 2 something that the user can mend, and one line on stderr says what;
1 a bug of ours; 130 stopped by Ctrl-C; 141 the reader of our pipe went away.
Knows no array. A command imports what only it needs.
"""

from __future__ import annotations

import io
import json as json_format
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from typer.core import TyperGroup

from tiny_llm.data import Chunk, Completion, SamplingParams
from tiny_llm.engine.llm import LLM
from tiny_llm.engine.memory import parse_bytes, peak_memory_bytes
from tiny_llm.errors import RequestError, TinyLLMError
from tiny_llm.options import (
    EXAMPLES,
    ActivationsOption,
    ApiKeyOption,
    BackendOption,
    ConcurrentOption,
    ContextOption,
    CorsOption,
    DebugOption,
    DrainOption,
    DtypeOption,
    FileOption,
    HostOption,
    JsonOption,
    KvMemoryOption,
    MaxStepOption,
    MaxTokensOption,
    MinPOption,
    ModelOption,
    NameOption,
    OfflineOption,
    PortOption,
    PromptOption,
    QuantizeOption,
    QueueOption,
    RawOption,
    SeedOption,
    StopOption,
    SystemOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    TraceOption,
    WaitOption,
)
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.weights.listing import listing

if TYPE_CHECKING:  # 60 ms that only a large model needs
    from rich.progress import Progress

ANSWER_TOKENS = 512
LARGE_BYTES = 2**28
"""Weights from this size on get a progress bar; smaller ones are there before it would be seen."""

_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])
"""Any mistake in the arguments; typer exports only this subclass of it."""


class _ChatByDefault(TyperGroup):
    """Without a command's name it is ``chat``: ``main.py --model X`` is ``main.py chat --model X``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["chat", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ChatByDefault,
    help="A language model on your own machine: chat with it, or ask it one thing.",
    epilog=EXAMPLES,
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.command()
def chat(
    model: ModelOption = "demo",
    system: SystemOption = None,
    max_tokens: MaxTokensOption = ANSWER_TOKENS,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    backend: BackendOption = None,
    threads: ThreadsOption = None,
    activations: ActivationsOption = "int8",
    offline: OfflineOption = False,
    debug: DebugOption = False,
) -> None:
    """Talk with a model ([b]the default command[/b]).

    In a terminal: a conversation; /help there lists its commands.

    With something piped in: the answer to it, and nothing else.
    """
    params = SamplingParams(max_tokens, temperature, top_k, top_p, min_p, seed, tuple(stop or ()))
    question = None if sys.stdin.isatty() else _read_stdin()
    options = _Options(dtype, quantize, offline, backend, threads, activations)
    llm = _load(model, options)
    if question is None:
        from tiny_llm.chat import Chat
        from tiny_llm.engine.conversation import Conversation

        Chat(model, Conversation(llm, system), params).run()
    else:
        _print_stream(llm.stream_chat(_messages(system, question), params))


@app.command()
def generate(
    prompt: PromptOption = None,
    file: FileOption = None,
    trace: TraceOption = None,
    raw: RawOption = False,
    system: SystemOption = None,
    model: ModelOption = "demo",
    max_tokens: MaxTokensOption = ANSWER_TOKENS,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    backend: BackendOption = None,
    threads: ThreadsOption = None,
    activations: ActivationsOption = "int8",
    kv_memory: KvMemoryOption = None,
    max_step_ms: MaxStepOption = 100.0,
    offline: OfflineOption = False,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print one line: the answer and its figures.", rich_help_panel="Output"),
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Answer one prompt, or each of a file's.

    The answer goes to stdout as it is made, its figures to stderr at the end.
    """
    params = SamplingParams(max_tokens, temperature, top_k, top_p, min_p, seed, tuple(stop or ()))
    if file is not None and prompt is not None:
        raise RequestError("--file and --prompt were both given; give one of them.")
    if file is None and prompt is None:
        if sys.stdin.isatty():
            raise RequestError("There is no prompt; give --prompt TEXT, or pipe a text in.")
        prompt = _read_stdin()
    if raw and system is not None:
        raise RequestError("--system needs the chat template, which --raw leaves out; give one of them.")
    scheduler = SchedulerSettings(max_step_ms=max_step_ms)
    memory = None if kv_memory is None else parse_bytes(kv_memory)
    options = _Options(dtype, quantize, offline, backend, threads, activations, memory, scheduler)
    if file is not None:
        from tiny_llm.engine.offline import answer_file

        return answer_file(_load(model, options), file, params, system=system, raw=raw, trace=trace)
    assert prompt is not None
    messages = [] if raw else _messages(system, prompt)
    llm = _load(model, options)
    chunks = llm.stream(prompt, params) if raw else llm.stream_chat(messages, params)
    if json:
        *_, last = chunks
        assert last.completion is not None
        print(_as_json(model, last.completion))
    else:
        from tiny_llm.chat import figures

        print(figures(_print_stream(chunks)), file=sys.stderr)


@app.command()
def serve(
    model: ModelOption = "demo",
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    name: NameOption = None,
    api_key: ApiKeyOption = None,
    cors_origin: CorsOption = None,
    drain_seconds: DrainOption = 30.0,
    max_concurrent: ConcurrentOption = 256,
    max_queue: QueueOption = 256,
    max_wait: WaitOption = 300.0,
    max_model_len: ContextOption = None,
    kv_memory: KvMemoryOption = None,
    max_step_ms: MaxStepOption = 100.0,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    backend: BackendOption = None,
    threads: ThreadsOption = None,
    activations: ActivationsOption = "int8",
    offline: OfflineOption = False,
    debug: DebugOption = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients expect it."""
    from tiny_llm.engine.async_llm import AsyncLLM
    from tiny_llm.server.run import serve as run
    from tiny_llm.server.settings import ServerSettings

    settings = ServerSettings(
        name=name or Path(model).name,
        api_keys=tuple(api_key or ()),
        max_in_flight=max_concurrent + max_queue,
        drain_s=drain_seconds,
        cors_origins=tuple(cors_origin or ()),
    )
    limits = SchedulerSettings(
        max_num_seqs=max_concurrent,
        max_step_ms=max_step_ms,
        max_queued_requests=max_queue,
        max_wait_s=max_wait,
    )
    memory = None if kv_memory is None else parse_bytes(kv_memory)
    options = _Options(dtype, quantize, offline, backend, threads, activations, memory, limits).arguments()

    def load() -> AsyncLLM:
        bar = _LoadingBar()
        try:
            return AsyncLLM(model, **options, max_context=max_model_len, progress=bar)
        finally:
            bar.close()

    run(settings, host, port, load)


@app.command()
def bench(
    model: ModelOption = "demo",
    load_format: Annotated[
        Literal["auto", "dummy"],
        typer.Option(
            help="dummy: random weights in a short name's shapes; no download.", rich_help_panel="Model"
        ),
    ] = "auto",
    prompt_tokens: Annotated[
        int, typer.Option(help="Tokens of a prompt; they are random.", rich_help_panel="Work")
    ] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", rich_help_panel="Work")] = 64,
    batch: Annotated[int, typer.Option(help="Sequences at a time.", rich_help_panel="Work")] = 1,
    rounds: Annotated[int, typer.Option(help="Of which the median counts.", rich_help_panel="Work")] = 3,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    backend: BackendOption = None,
    threads: ThreadsOption = None,
    activations: ActivationsOption = "int8",
    offline: OfflineOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure how fast a model answers."""
    from tiny_llm.engine.bench import Task
    from tiny_llm.engine.bench import bench as run

    work = (prompt_tokens, new_tokens, batch, rounds)
    task = Task(model, load_format, quantize, dtype, activations, *work)
    row = run(task, backend=backend, threads=threads, offline=offline)
    print(json_format.dumps(row)) if json else _print_row(row)


def _print_row(row: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(style="dim")
    for name, value in row.items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)


@app.command()
def models() -> None:
    """List the short names: hub id, parameters, download size, and whether it is on disk."""
    for row in listing():
        print("{:<15} {:<37} {:>10} {:>9}  {}".format(*row))


@app.command(
    add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
def course(context: typer.Context) -> None:
    """Build this runtime yourself: list, start, check, hint, diff, solution, break."""
    from tiny_llm.course.commands import app as lessons

    _pass_on(context, lessons)


@app.command(
    add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
def memory(context: typer.Context) -> None:
    """Say how much memory a model takes, and how far this machine's reaches; nothing is loaded."""
    from tiny_llm.planning.commands import app as calculator

    _pass_on(context, calculator)


@app.command(
    add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
def doctor(context: typer.Context) -> None:
    """Say which backends this machine has, and where our kernels or MLX's own run."""
    from tiny_llm.planning.doctor import app as report

    _pass_on(context, report)


def _pass_on(context: typer.Context, to: typer.Typer) -> None:
    with typer.main.get_command(to).make_context(context.command_path, context.args) as inner:
        inner.command.invoke(inner)


def _messages(system: str | None, question: str) -> list[dict[str, str]]:
    if not question.strip():
        raise RequestError("The prompt is empty; say something, by --prompt TEXT or through a pipe.")
    asked = {"role": "user", "content": question}
    return [asked] if system is None else [{"role": "system", "content": system}, asked]


def _read_stdin() -> str:
    """All of stdin without the newline at its end. Raises RequestError if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"The text on stdin is not valid UTF-8 at byte {error.start}; convert it first (iconv -t UTF-8)."
        ) from error


@dataclass(frozen=True, slots=True)
class _Options:
    """How a model is loaded and run; the fields are LLM's arguments."""

    dtype: str | None
    quantize: int | None
    offline: bool
    backend: str | None
    threads: int | None
    activations: str
    kv_memory: int | None = None
    scheduler: SchedulerSettings | None = None

    def arguments(self) -> dict[str, Any]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _load(model: str, options: _Options) -> LLM:
    bar = _LoadingBar()
    try:
        return LLM(model, **options.arguments(), progress=bar)
    finally:
        bar.close()


class _LoadingBar:
    """A progress bar on stderr while large weights load; the loader calls it."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes are read."""
        if total < LARGE_BYTES or not sys.stderr.isatty():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

            columns = (TextColumn("Loading"), BarColumn(), DownloadColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


def _print_stream(chunks: Iterator[Chunk]) -> Completion:
    completion = None
    for chunk in chunks:
        print(chunk.text, end="", flush=True)
        completion = chunk.completion
    print()
    assert completion is not None
    return completion


def _as_json(model: str, completion: Completion) -> str:
    """One line whatever the text holds: json escapes all that is not ASCII."""
    timing = completion.timing
    return json_format.dumps(
        {
            "model": model,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": timing.prompt_tokens,
            "completion_tokens": timing.completion_tokens,
            "ttft_s": round(timing.ttft_s, 6),
            "prefill_tok_s": round(timing.prefill_tok_s, 3),
            "decode_tok_s": round(timing.decode_tok_s, 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }
    )


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
    except _UsageError as error:
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
        from tiny_llm.course.restart import restart_with_learner

        restart_with_learner(arguments)
    program = Path(sys.argv[0]).name
    name = "python main.py" if program == "main.py" else program
    command = typer.main.get_command(app)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            with command.make_context(name, arguments) as context:
                command.invoke(context)
    except typer.Exit as done:  # --help
        return done.exit_code
    finally:
        sys.stdout.flush()
    return 0


def _show_warning(message: Warning | str, *_where: object, **_more: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _fail(error: Exception, what: str, code: int, arguments: list[str]) -> int:
    if "--debug" in arguments:
        traceback.print_exception(error)
    print(f"error: {' '.join(what.split())}", file=sys.stderr)
    return code
