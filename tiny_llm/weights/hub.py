"""From a model's name to a local folder with its files, or to its GGUF file.

Owns where models come from: the bundled ones, a folder, the Hugging Face cache, the hub. Refuses
to know what is in the files. A model that is complete on disk needs no network, not even to ask
for a newer one; small files that another program left out are asked for once.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

# A lazy package: 8 ms here, and 0.2 s at the first use of one of its names.
import huggingface_hub

from tiny_llm.errors import ConfigError, TinyLLMError, WeightError, did_you_mean
from tiny_llm.weights.download import complete, download, download_gguf, named, unknown_files
from tiny_llm.weights.gguf.header import GGUF
from tiny_llm.weights.names import short_names
from tiny_llm.weights.shards import shard_names

if TYPE_CHECKING:  # importing it takes 0.1 s; it is there once a download was tried
    import huggingface_hub.errors

BUNDLED: Mapping[str, str] = {"demo": "demo", "demo-draft": "demo/draft"}
# The hub's own rules; two hyphens would also make two models share a folder of the cache.
REPO_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b", re.ASCII)
NEEDED_FILES = ("config.json", "tokenizer.json")


def resolve(name: str, *, offline: bool = False) -> Path:
    """Return the local folder of a model, or its GGUF file, downloading it if that is needed and allowed.

    ``name``: ``demo`` or ``demo-draft`` (bundled), a folder that holds config.json, a ``.gguf`` file, a short
    name such as ``qwen2-1.5b``, a hub id ``organization/name``, or a GGUF file there by its name or its type,
    ``organization/name:Q4_K_M``. ``offline``, or HF_HUB_OFFLINE=1 in the environment, forbids the network. An
    interrupted download goes on where it stopped.

    Raises ConfigError for a name that means nothing, WeightError if the files cannot be had.
    """
    if name in BUNDLED:
        return Path(str(importlib.resources.files("tiny_llm").joinpath(BUNDLED[name])))
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):  # unlike Path's, never an error
        if not (Path(folder) / "config.json").is_file():
            raise ConfigError(f"The folder {folder} has no config.json, so it is not a model's folder.")
        return Path(folder)
    if folder.endswith(GGUF) and os.path.isfile(folder):
        return Path(folder)
    repo_id, colon, file = name.partition(":")
    repo_id = _repo_id(repo_id if colon and file else name)
    is_offline = offline or huggingface_hub.is_offline_mode()
    if colon:
        return _gguf(repo_id, file, is_offline)
    cached = cached_folder(repo_id)
    if cached is not None:
        if not is_offline and unknown_files(cached):
            # Small files that another program did not want; without them the model is usable still.
            with contextlib.suppress(Exception):  # the client's network errors share no public base
                complete(repo_id, cached)
        return cached
    if is_offline:
        raise _offline(repo_id)
    return _download(repo_id)


def cached_folder(repo_id: str) -> Path | None:
    """Return the model's folder in the Hugging Face cache, or None unless every file needed is there."""
    config = huggingface_hub.try_to_load_from_cache(repo_id, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if not _missing_files(folder) else None


def models_on_disk() -> list[str]:
    """Return the ids of the complete models in the Hugging Face cache, sorted."""
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    found = [path.name.removeprefix("models--").replace("--", "/", 1) for path in cache.glob("models--*--*")]
    return sorted(repo_id for repo_id in found if REPO_ID.fullmatch(repo_id) and cached_folder(repo_id))


def ggufs_on_disk() -> dict[str, Path]:
    """Return the GGUF files in the Hugging Face cache by name, ``organization/name:file``, sorted."""
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    found = [path for path in cache.glob(f"models--*--*/snapshots/*/*{GGUF}") if path.is_file()]
    repos = [path.parents[2].name.removeprefix("models--").replace("--", "/", 1) for path in found]
    return dict(sorted((f"{repo_id}:{path.name}", path) for repo_id, path in zip(repos, found, strict=True)))


def _gguf(repo_id: str, wanted: str, is_offline: bool) -> Path:
    here = ggufs_on_disk()
    files = [name.partition(":")[2] for name in here if name.startswith(f"{repo_id}:")]
    if len(found := named(files, wanted)) == 1:
        return here[f"{repo_id}:{found[0]}"]
    if is_offline:
        raise _offline(f"{repo_id}:{wanted}")
    return _asked(repo_id, lambda: download_gguf(repo_id, wanted))


def _repo_id(name: str) -> str:
    if name.lower() in short_names():
        return short_names()[name.lower()].repo_id
    if os.path.exists(os.path.expanduser(name)):
        raise ConfigError(f"{name} is a file, but a model is a folder. Give the folder that holds it.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        hint = " A file on the hub is organization/name:file.gguf." if name.endswith(GGUF) else ""
        raise ConfigError(f"There is no {'file' if hint else 'folder'} {name}.{hint}")
    if not REPO_ID.fullmatch(name):
        hint = did_you_mean(name, [*BUNDLED, *short_names()])
        raise ConfigError(
            f"There is no model {name!r}: expected a folder, a hub id (organization/name) or a short name "
            f"(`main.py models` lists them).{hint}"
        )
    return name


def _missing_files(folder: Path) -> list[str]:
    missing = [name for name in NEEDED_FILES if not (folder / name).is_file()]
    try:
        return missing + [name for name in shard_names(folder) if not (folder / name).is_file()]
    except WeightError:  # no weights, or a broken index: to be downloaded
        return [*missing, "model.safetensors"]


def _asked(repo_id: str, download: Callable[[], Path]) -> Path:
    try:
        return download()
    except WeightError:
        raise
    except Exception as error:  # the client's network errors share no public base; all end the download
        raise _explain(repo_id, error) from error


def _download(repo_id: str) -> Path:
    folder = _asked(repo_id, lambda: download(repo_id))
    missing = _missing_files(folder)
    if missing:
        raise WeightError(
            f"{repo_id} has no {' or '.join(missing)} on the hub, so it cannot be used. "
            "Look for a repository of the same model with safetensors and tokenizer.json."
        )
    return folder


def _offline(name: str) -> WeightError:
    return WeightError(f"{name} is not on disk, and the network is off. {_what_is_here()}")


def _explain(repo_id: str, error: Exception) -> TinyLLMError:
    """Say what stopped a download, and what to do about it."""
    errors = huggingface_hub.errors
    endpoint, cache = huggingface_hub.constants.ENDPOINT, huggingface_hub.constants.HF_HUB_CACHE
    page = f"{endpoint}/{repo_id}"
    if isinstance(error, errors.GatedRepoError):
        return WeightError(
            f"{repo_id} is gated. Accept its terms at {page}, create a token there, and set HF_TOKEN to it."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        known = [row.repo_id for row in short_names().values()] + models_on_disk()
        hint = did_you_mean(repo_id, known)
        return ConfigError(f"The hub has no model {repo_id}, or it is private (then set HF_TOKEN).{hint}")
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return WeightError(f"The hub refuses {repo_id} to you. See {page} and set HF_TOKEN.")
    network = isinstance(error, ConnectionError | TimeoutError)
    if isinstance(error, OSError) and error.errno is not None and not network:
        return WeightError(f"{repo_id} cannot be written to {cache}: {error}.")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return WeightError(
        f"{repo_id} could not be downloaded from {endpoint}: {reason}. "
        f"Check the network and run the same command again: it goes on where it stopped. {_what_is_here()}"
    )


def _what_is_here() -> str:
    return f"On disk: {', '.join(['demo (bundled)', *models_on_disk(), *ggufs_on_disk()])}."
