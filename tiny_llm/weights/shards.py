"""Which files of a folder hold its weights, which tensor lies in which, and what tells them from others.

Owns the sharded index and the rule that no path leaves the folder. Refuses to know what a model
needs: it only says what is stored.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tiny_llm.errors import WeightError
from tiny_llm.weights.header import StoredTensor, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000


def shard_names(folder: Path) -> list[str]:
    """Return the names of the files that hold the folder's weights; they need not all exist.

    ``model.safetensors`` if there, else the files of ``model.safetensors.index.json``, else the
    only ``*.safetensors`` file. Raises WeightError if there is none, if there are several without
    an index, or if the index is broken or names a path that is not a plain file name.
    """
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    if (folder / INDEX_FILE).exists():
        return sorted(set(_weight_map(folder).values()))
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise WeightError(
            f"{folder} has {len(found)} safetensors files but no {INDEX_FILE} to say which belong together. "
            "Copy the index beside them."
        )
    raise WeightError(
        f"{folder} has no weights: expected {SINGLE_FILE} or {INDEX_FILE}.{_other_formats(folder)}"
    )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor in the folder's weight files, by name, from headers that were checked.

    Raises WeightError for a shard that is missing, corrupt or outside the folder, for a tensor
    stored twice, and for one that is not in the shard where the index puts it.
    """
    stored: dict[str, StoredTensor] = {}
    for file_name in shard_names(folder):
        path = _inside(folder, file_name)
        for name, tensor in read_header(path).items():
            if name in stored:
                raise WeightError(f"{name} is stored twice: in {stored[name].path.name} and {file_name}.")
            stored[name] = tensor
    if not (folder / SINGLE_FILE).exists() and (folder / INDEX_FILE).exists():
        _check_index(folder, stored)
    return stored


def weights_digest(folder: Path) -> bytes:
    """SHA-256 of the files that a model in ``folder`` is made of: its config, and all of its weights.

    Takes a second for about 1.5 GB. Raises WeightError if there are no weights.
    """
    digest = hashlib.sha256()
    for name in ("config.json", *shard_names(folder)):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.digest()


def _check_index(folder: Path, stored: dict[str, StoredTensor]) -> None:
    for name, file_name in _weight_map(folder).items():
        if name not in stored or stored[name].path.name != file_name:
            raise WeightError(
                f"{folder / INDEX_FILE} puts {name} in {file_name}, which does not hold it. "
                "Copy the index and its files again, from one place."
            )


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX_FILE
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise WeightError(f"{path} is over {MAX_INDEX_BYTES} bytes, too large for an index.")
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise WeightError(f"{path} is not valid JSON. Download or copy it again.") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightError(f"{path} has no weight_map from tensor names to file names.")
    for name, file_name in weight_map.items():
        if not _is_plain(file_name):
            raise WeightError(
                f"{path} puts {name} in {file_name!r:.120}, but only a *.safetensors file "
                "of the same folder is allowed."
            )
    return weight_map


def _is_plain(file_name: object) -> bool:
    return (
        isinstance(file_name, str)
        and file_name.endswith(".safetensors")
        and not any(mark in file_name for mark in ("/", "\\", ":", "\0"))
    )


def _inside(folder: Path, file_name: str) -> Path:
    """Return the file's path; it may be a link only into the blobs of the hub cache that it lies in."""
    path = folder / file_name
    if not path.is_file():
        raise WeightError(f"{path} is missing: the checkpoint is incomplete. Download or copy it again.")
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes += [home.parents[1] / "blobs", home.parents[2] / "blobs"]  # the repository's, and shared ones
    if not any(path.resolve().is_relative_to(allowed) for allowed in homes):
        raise WeightError(f"{path} is a link to {path.resolve()}, outside its folder. Copy the file instead.")
    return path


def _other_formats(folder: Path) -> str:
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f" There is {ggufs[0].name}: give that file itself as the model."
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    return f" Found {others[0]}, a format that is not read: convert it to safetensors." if others else ""
