"""Owns ``python main.py serve``: its options, and the server's settings that they become."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tiny_llm.commands.grouped import grouped
from tiny_llm.commands.loading import arguments, load_async
from tiny_llm.commands.two import ALONE, PeerOptions
from tiny_llm.engine.llm import LLM
from tiny_llm.limits import MOST
from tiny_llm.options import ENGINE, DebugOption, EngineOptions, command_app, option
from tiny_llm.scheduler.settings import MAX_NUM_BATCHED_TOKENS
from tiny_llm.server.run import serve as run
from tiny_llm.server.settings import ServerSettings

app = command_app()

PROMPT_TOKENS = 1024
"""Of a step, at least, for prompts."""


@app.command()
@grouped()
def serve(
    host: Annotated[str, option("Server", "Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, option("Server", "Port; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, option("Server", "What clients call the model, if not as --model.", "--name")
    ] = None,
    alias: Annotated[
        list[str] | None,
        option(
            "Server", 'Another name for it; "claude-*" is any that begins so. May be given several times.'
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        option(
            "Server", "A key that clients must send; may be given several times.", envvar="TINY_LLM_API_KEY"
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, option("Server", "A site whose pages may call the server.")
    ] = None,
    drain_seconds: Annotated[float, option("Server", "What running requests get after SIGTERM.")] = 30.0,
    max_concurrent: Annotated[int, option("Limits", "Sequences that run at a time.")] = 256,
    max_queue: Annotated[
        int, option("Limits", "Answers that may wait beyond those that could run at once; more get a 429.")
    ] = 256,
    max_wait: Annotated[float, option("Limits", "Seconds that a request may wait before a 503.")] = 300.0,
    two: PeerOptions = ALONE,
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
        aliases=tuple(alias or ()),
    )
    if given["ranks"].leader is not None:  # under mlx.launch: only rank 0 has clients
        LLM(**given)
    run(settings, host, port, two.joined(lambda: load_async(given)))
