"""Brings a hub repository's files into the Hugging Face cache, large ones going on where they stopped.

Owns which files may be asked for, and resuming: huggingface_hub since 1.18 starts a file anew in each
process, which loses all of a model that is one file. So files whose SHA-256 the hub publishes are
fetched here to where huggingface_hub looks for them, and checked; it then does the rest. Refuses to
know model names and what errors mean to a user.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

# A lazy package: 8 ms here, and 0.2 s at the first use of one of its names.
import huggingface_hub

from tiny_llm.config_embedding import EMBEDDING_FILES
from tiny_llm.errors import WeightError
from tiny_llm.weights.gguf.header import GGUF

if TYPE_CHECKING:  # loaded by the lazy names that are used before them
    import huggingface_hub.file_download
    import huggingface_hub.utils

OPTIONAL = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    *EMBEDDING_FILES,
)
ALLOWED = ("config.json", "tokenizer.json", *OPTIONAL, "*.safetensors", "*.safetensors.index.json")
IGNORED = ("*/*", "consolidated*")  # other formats' copies of the same weights
SHOWN_FILES = 20
LAST = "config.json"  # once it is there, so is the rest
SHA256 = re.compile("[0-9a-f]{64}")
PARTIAL = ".tiny_llm.incomplete"
LISTING_SECONDS = 5.0


def download(repo_id: str) -> Path:
    """Download what a model needs, and return its snapshot folder in the Hugging Face cache.

    Shows a progress bar a file on a terminal. Raises WeightError if the disk is too small or a
    file arrives damaged, and whatever huggingface_hub raises.
    """
    info = huggingface_hub.model_info(repo_id, files_metadata=True)
    wanted = [file.rfilename for file in info.siblings or [] if _is_wanted(file.rfilename)]
    if LAST not in wanted:
        ggufs = [file.rfilename for file in info.siblings or [] if file.rfilename.endswith(GGUF)]
        hint = f" It has GGUF files, for example {repo_id}:{ggufs[0]}." if ggufs else ""
        raise WeightError(
            f"{repo_id} on the hub has no {LAST}, so it is not a model that can be loaded.{hint}"
        )
    folder = _bring(repo_id, info, sorted(wanted, key=lambda name: name == LAST)).parent
    _remember_missing(folder, set(OPTIONAL).difference(wanted))
    return folder


def download_gguf(repo_id: str, wanted: str) -> Path:
    """Download a GGUF file, as ``named`` finds it, and return where it lies. Raises as ``download`` does."""
    info = huggingface_hub.model_info(repo_id, files_metadata=True)
    names = [file.rfilename for file in info.siblings or [] if file.rfilename.endswith(GGUF)]
    found = named(names, wanted)
    if len(found) != 1:
        what = "several GGUF files" if found else "no GGUF file"
        some = ", ".join(sorted(found or names)[:SHOWN_FILES]) or "none"
        raise WeightError(f"{repo_id} has {what} of the name or type {wanted!r}. There are: {some}.")
    return _bring(repo_id, info, found)


def named(files: Iterable[str], wanted: str) -> list[str]:
    """The GGUF files of this name, or whose names end with this type: Q4_K_M finds model-q4_k_m.gguf."""
    ends = tuple(f"{mark}{wanted}{GGUF}".lower() for mark in "-._")
    return [name for name in files if name == wanted or name.lower().endswith(ends)]


def _bring(repo_id: str, info: huggingface_hub.ModelInfo, names: Sequence[str]) -> Path:
    """Bring these files, in order, and return where the last one lies."""
    wanted = {file.rfilename: file.lfs for file in info.siblings or [] if file.rfilename in names}
    blobs = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    large = [
        (name, lfs.sha256, lfs.size)
        for name, lfs in wanted.items()
        if lfs is not None and SHA256.fullmatch(lfs.sha256) and not (blobs / lfs.sha256).exists()
    ]
    _check_space(blobs, sum(size for _, _, size in large))
    for name, sha256, size in large:
        url = huggingface_hub.hf_hub_url(repo_id, name, revision=info.sha)
        _fetch(url, blobs / sha256, sha256, size, name)
    for name in names:
        path = huggingface_hub.hf_hub_download(repo_id, name)
    return Path(path)


def unknown_files(folder: Path) -> set[str]:
    """The small files that a snapshot folder lacks, and of which nobody has said that there are none."""
    return {name for name in OPTIONAL if not (folder / name).is_file() and not _mark(folder, name).is_file()}


def complete(repo_id: str, folder: Path) -> None:
    """Bring small files that another program left out of a snapshot; which ones there are not is remembered.

    Raises whatever huggingface_hub raises.
    """
    unknown = unknown_files(folder)
    info = huggingface_hub.model_info(repo_id, revision=folder.name, timeout=LISTING_SECONDS)
    there = unknown & {file.rfilename for file in info.siblings or []}
    for name in sorted(there):
        huggingface_hub.hf_hub_download(repo_id, name, revision=folder.name)
    _remember_missing(folder, unknown - there)


def _mark(folder: Path, name: str) -> Path:
    """huggingface_hub's own sign that a snapshot has no such file."""
    return folder.parents[1] / ".no_exist" / folder.name / name


def _remember_missing(folder: Path, names: set[str]) -> None:
    for name in names:
        _mark(folder, name).parent.mkdir(parents=True, exist_ok=True)
        _mark(folder, name).touch()


def _is_wanted(name: str) -> bool:
    is_ignored = name not in OPTIONAL and any(fnmatch(name, pattern) for pattern in IGNORED)
    return not is_ignored and any(fnmatch(name, pattern) for pattern in ALLOWED)


def _check_space(folder: Path, needed: int) -> None:
    there = sum(path.stat().st_size for path in folder.glob(f"*{PARTIAL}"))
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise WeightError(
            f"The download needs {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free. "
            "Make room, or set HF_HOME to a folder on a larger disk."
        )


def _fetch(url: str, target: Path, sha256: str, size: int, label: str) -> None:
    """Bring one file to ``target``, from wherever an earlier try stopped."""
    partial = target.with_name(f"{sha256}{PARTIAL}")
    partial.touch()
    with partial.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits while another process has it
        if target.exists():  # another process brought it while this one waited
            partial.unlink(missing_ok=True)
            return
        start = file.seek(0, 2)
        if start > size:  # two writers, on a disk that has no locks
            file.truncate(0)
            start = file.seek(0)
        headers = huggingface_hub.utils.build_hf_headers()  # type: ignore[attr-defined]  # documented
        huggingface_hub.file_download.http_get(
            url, file, resume_size=start, headers=headers, expected_size=size, displayed_filename=label
        )
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            partial.unlink()
            raise WeightError(f"{label} arrived damaged: its SHA-256 is not {sha256}. Run the command again.")
        partial.rename(target)
