"""Owns ``python main.py follow``: a process that has a part of a model, and does what rank 0 tells it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from tiny_llm.commands.grouped import grouped
from tiny_llm.commands.loading import arguments
from tiny_llm.engine.llm import LLM
from tiny_llm.options import ENGINE, DebugOption, EngineOptions, command_app, option

app = command_app()


@app.command()
@grouped("ranks", "rank_address")
def follow(
    leader: Annotated[str, option("Machines", "HOST:PORT: what rank 0 has as --rank-address.")],
    options: EngineOptions = ENGINE,
    debug: DebugOption = False,
) -> None:
    """Share a model with the process at --leader, until that leaves.

    Give it the options of the model that rank 0 has, and TINY_LLM_RANK_SECRET in the environment of both.
    """
    given = arguments(options)
    LLM(**given | {"ranks": replace(given["ranks"], leader=leader)})
