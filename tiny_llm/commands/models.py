"""Owns ``python main.py models``: which models there are, how large, and whether they are on disk."""

from __future__ import annotations

from collections.abc import Iterator

from tiny_llm.options import command_app
from tiny_llm.weights.hub import BUNDLED, cached_folder, ggufs_on_disk, resolve
from tiny_llm.weights.names import short_names


def listing() -> Iterator[tuple[str, str, str, str, str]]:
    """Yield a row of headings, then one a model: name, hub id, parameters, size, whether it is on disk."""
    yield "NAME", "MODEL", "PARAMETERS", "SIZE", "ON DISK"
    for name in BUNDLED:
        stored = sum(file.stat().st_size for file in resolve(name).glob("*.safetensors"))
        yield name, "bundled", "", f"{stored / 1e6:.1f} MB", "yes"
    for name, model in short_names().items():
        here = "yes" if cached_folder(model.repo_id) else "no"
        size = f"{model.download_bytes / 1e9:.1f} GB"
        yield name, model.repo_id, f"{model.parameters / 1e9:.2f} B", size, here
    for name, path in ggufs_on_disk().items():
        yield "", name, "", f"{path.stat().st_size / 1e9:.1f} GB", "yes"


app = command_app()


@app.command()
def models() -> None:
    """List the short names: hub id, parameters, download size, and whether it is on disk."""
    for row in list(listing()):  # all of them first: an error then stands alone
        print("{:<20} {:<37} {:>10} {:>9}  {}".format(*row))
