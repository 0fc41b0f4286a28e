"""Owns ``python main.py serve``: its options, and the server's settings that they become."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiny_llm.commands.grouped import grouped
from tiny_llm.commands.loading import arguments, load_async
from tiny_llm.limits import MOST
from tiny_llm.options import ENGINE, DebugOption, EngineOptions, command_app
from tiny_llm.scheduler.settings import MAX_NUM_BATCHED_TOKENS
from tiny_llm.server.run import serve as run
from tiny_llm.server.settings import ServerSettings

app = command_app()

PROMPT_TOKENS = 1024
"""Of a step, at least, for prompts."""

HostOption = Annotated[
    str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.", rich_help_panel="Server")
]
PortOption = Annotated[int, typer.Option(help="Port; 0 takes a free one.", rich_help_panel="Server")]
NameOption = Annotated[
    str | None,
    typer.Option("--name", help="What clients call the model, if not as --model.", rich_help_panel="Server"),
]
ApiKeyOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A key that clients must send; may be given several times.",
        envvar="TINY_LLM_API_KEY",
        rich_help_panel="Server",
    ),
]
CorsOption = Annotated[
    list[str] | None,
    typer.Option(help="A site whose pages may call the server.", rich_help_panel="Server"),
]
DrainOption = Annotated[
    float, typer.Option(help="What running requests get after SIGTERM.", rich_help_panel="Server")
]
ConcurrentOption = Annotated[
    int, typer.Option(help="Sequences that run at a time.", rich_help_panel="Limits")
]
QueueOption = Annotated[
    int,
    typer.Option(
        help="Answers that may wait beyond those that could run at once; more get a 429.",
        rich_help_panel="Limits",
    ),
]
WaitOption = Annotated[
    float, typer.Option(help="Seconds that a request may wait before a 503.", rich_help_panel="Limits")
]


@app.command()
@grouped
def serve(
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    name: NameOption = None,
    api_key: ApiKeyOption = None,
    cors_origin: CorsOption = None,
    drain_seconds: DrainOption = 30.0,
    max_concurrent: ConcurrentOption = 256,
    max_queue: QueueOption = 256,
    max_wait: WaitOption = 300.0,
    options: EngineOptions = ENGINE,
    debug: DebugOption = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients expect it."""
    given = arguments(
        options,
        max_num_seqs=max_concurrent,
        # Of a step's tokens, each sequence has one; the rest is for prompts.
        max_num_batched_tokens=max(MAX_NUM_BATCHED_TOKENS, max_concurrent + PROMPT_TOKENS),
        max_queued_requests=max_queue,
        max_wait_s=max_wait,
    )
    settings = ServerSettings(
        name=name or Path(options.model).name,
        api_keys=tuple(api_key or ()),
        max_in_flight=min(max_concurrent + max_queue, MOST),
        drain_s=drain_seconds,
        cors_origins=tuple(cors_origin or ()),
    )
    run(settings, host, port, lambda: load_async(given))
