"""Owns ``python main.py bench``: its options, and its row as a table or as JSON."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from rich.table import Table

from tiny_llm.commands.grouped import grouped
from tiny_llm.commands.loading import arguments
from tiny_llm.options import ENGINE, DebugOption, EngineOptions, JsonOption, command_app, option
from tiny_llm.planning.bench import Task
from tiny_llm.planning.bench import bench as run

app = command_app()


@app.command()
@grouped()
def bench(
    load_format: Annotated[
        Literal["auto", "dummy"],
        option("Model", "dummy: random weights in a short name's shapes; no download."),
    ] = "auto",
    prompt_tokens: Annotated[int, option("Work", "Tokens of a prompt; they are random.")] = 512,
    new_tokens: Annotated[int, option("Work", "Tokens of an answer.")] = 64,
    batch: Annotated[int, option("Work", "Sequences at a time.")] = 1,
    rounds: Annotated[int, option("Work", "Of which the median counts.")] = 3,
    fit: Annotated[
        Path | None,
        option("Output", "Also measure steps of many kinds, into this file for `simulate --costs`."),
    ] = None,
    options: EngineOptions = ENGINE,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure how fast a model answers."""
    given = arguments(options)
    task = Task(
        load_format=load_format,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        rounds=rounds,
        **{name: given.pop(name) for name in ("model", "dtype", "quantize", "activations")},
    )
    row = run(task, fit, **given)
    print(json_format.dumps(row)) if json else _print(row)


def _print(row: Mapping[str, object]) -> None:
    table = Table(show_header=False)
    table.add_column(style="dim")
    for name, value in row.items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)
