"""Owns ``python main.py bench``: its options, and its row as a table or as JSON."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table

from tiny_llm.commands.grouped import grouped
from tiny_llm.commands.loading import arguments
from tiny_llm.options import ENGINE, DebugOption, EngineOptions, JsonOption, command_app, option
from tiny_llm.planning.bench import Task
from tiny_llm.planning.bench import bench as run

app = command_app()
TASK = Task()


@app.command()
@grouped()
def bench(
    task: Task = TASK,
    fit: Annotated[
        Path | None,
        option("Output", "Also measure steps of many kinds, into this file for `simulate --costs`."),
    ] = None,
    options: EngineOptions = ENGINE,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure how fast a model answers."""
    row = run(task, fit=fit, **arguments(options))
    print(json_format.dumps(row)) if json else _print(row)


def _print(row: Mapping[str, object]) -> None:
    table = Table(show_header=False)
    table.add_column(style="dim")
    for name, value in row.items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)
