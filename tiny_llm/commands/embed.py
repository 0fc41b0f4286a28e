"""Owns ``python main.py embed``: texts to vectors, as lines of JSON, or how near they are to each other."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from math import hypot
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tiny_llm.commands.grouped import grouped
from tiny_llm.commands.loading import load
from tiny_llm.commands.talking import read_stdin
from tiny_llm.config_embedding import TextEmbedding
from tiny_llm.options import ENGINE, DebugOption, EngineOptions, command_app, option

app = command_app()
_SHOWN = 40  # characters of a text


@app.command()
@grouped()
def embed(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; without any, each line of what is piped in.")
    ] = None,
    prompt_name: Annotated[
        str | None, option("Prompt", "Put the model's own prompt of this name before each: query, document.")
    ] = None,
    instruction: Annotated[
        str | None, option("Prompt", "Put this before each, as it is: $'Instruct: Find code\\nQuery:'.")
    ] = None,
    dimensions: Annotated[
        int | None, option("Output", "Keep the first so many numbers of each vector; all by default.")
    ] = None,
    options: EngineOptions = ENGINE,
    json: Annotated[
        bool, option("Output", "Print a line a text: the text, its tokens, its vector.", "--json")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Turn texts into vectors, and show how alike they are: 1 is the same, near 0 nothing in common.

    Made for models trained for it, such as qwen3-embedding-0.6b; else it is the last token's hidden state.
    """
    given = texts or [line for line in read_stdin().split("\n") if line.strip()]
    llm = load(options)
    found = llm.embed(given, prompt=prompt_name, instruction=instruction, dimensions=dimensions)
    if not json:
        return _print(given, found)
    for text, one in zip(given, found, strict=True):
        row = {"text": text, "prompt_tokens": one.prompt_tokens, "embedding": one.vector}
        print(json_format.dumps({"model": options.model, **row}))


def _print(texts: Sequence[str], found: Sequence[TextEmbedding]) -> None:
    """Each text beside its cosine with each of them."""
    table = Table("", "text", "tokens", *(str(number) for number in range(1, len(found) + 1)))
    for number, (text, own) in enumerate(zip(texts, found, strict=True), 1):
        shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
        cosines = [f"{_cosine(own.vector, other.vector):.2f}" for other in found]
        table.add_row(str(number), Text(shown), str(own.prompt_tokens), *cosines)
    Console().print(table)


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (hypot(*a) * hypot(*b) or 1.0)
