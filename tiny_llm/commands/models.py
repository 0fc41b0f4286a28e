"""Owns ``python main.py models``: its rows as text."""

from __future__ import annotations

from tiny_llm.options import command_app
from tiny_llm.weights.listing import listing

app = command_app()


@app.command()
def models() -> None:
    """List the short names: hub id, parameters, download size, and whether it is on disk."""
    for row in list(listing()):  # all of them first: an error then stands alone
        print("{:<20} {:<37} {:>10} {:>9}  {}".format(*row))
