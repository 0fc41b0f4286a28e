"""Owns ``python main.py doctor``: what runs here, what does not and why, what was measured. No model."""

from __future__ import annotations

from collections.abc import Iterator

import typer

from tiny_llm.errors import ConfigError
from tiny_llm.ops.autotune import about_this_machine, autotuner
from tiny_llm.ops.backend import BACKENDS, active, choose

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["--help", "-h"]})


@app.command()
def doctor() -> None:
    """Say which backends this machine has, and where our kernels or MLX's own ops run."""
    for line in report():
        typer.echo(line)


def report() -> Iterator[str]:
    """The lines of it."""
    about = about_this_machine()
    yield f"device    {about['device']}, MLX {about['mlx']}, kernels {about['kernels']}"
    yield f"backend   {active()}"
    for name in BACKENDS:
        yield f"  {name:<9} {_state(name)}"
    measured = autotuner().known()
    yield "kernels   ours or MLX's own, as measured here" + ("" if measured else ": nothing measured yet")
    for case, found in measured.items():
        times = f"ours {found.ours_us:.0f} us, MLX {found.theirs_us:.0f} us"
        bits = "" if found.theirs_keeps_bits else ", whose bits depend on other rows"
        yield f"  {case:<40} {'ours' if found.ours else 'MLX'}: {times}{bits}"


def _state(name: str) -> str:
    try:
        choose(name)
    except ConfigError as error:
        return str(error)
    return "there"
