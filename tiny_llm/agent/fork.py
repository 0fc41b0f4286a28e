"""Owns trying a task in several ways: from one log on, each in a copy of the workspace, and keeping the best.

The ways share the history so far, and so, in our engine, the blocks of its keys and values. A way's worth is
its outcome: whether a check holds in its copy. What the best has changed is then done in the workspace, file
by file, each asked for and with its receipt.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tiny_llm.agent.action import Outcome, Prepared
from tiny_llm.agent.loop import Agent, Approve
from tiny_llm.agent.receipts import HEAD, LOG, Log, Record
from tiny_llm.agent.workspace import LEFT_OUT, Workspace

Start = Callable[[Log, Workspace], Agent]
Check = Callable[[Workspace], bool]


@dataclass(frozen=True, slots=True)
class Way:
    """One try: what the user had it do, how it ``ended``, whether the check holds, and in which ``folder``.

    ``shared_tokens`` of the ``prompt_tokens`` of its first prompt were in the prefix cache.
    """

    hint: str
    ended: Record
    is_right: bool
    steps: int
    prompt_tokens: int
    shared_tokens: int
    folder: Path


def try_ways(log: Log, workspace: Workspace, hints: Sequence[str], start: Start, check: Check) -> list[Way]:
    """Go on from ``log`` in each way, one after the other. The best comes first: right, then fewest steps.

    All begin from what is there now: no way sees another's work, or pays for it.
    """
    number = len(log.records)
    folders = [_forked(log, workspace, f"way{number + more}") for more in range(len(hints))]
    ways = [_tried(log, folder, hint, start, check) for folder, hint in zip(folders, hints, strict=True)]
    return sorted(ways, key=lambda way: (not way.is_right, way.ended["reason"] != "finished", way.steps))


def keep(way: Way, log: Log, workspace: Workspace, approve: Approve) -> int:
    """Make the workspace as the way's copy is; return how many changes were refused."""
    refused = 0
    for change in _changes(way, workspace):
        about = {"what": change.what, "before": change.before, "worked_s": log.records[-1]["worked_s"]}
        why = approve(change)
        log.append("take", **about, after=change.after, refused=why)
        if not why:
            log.append("taken", **about, after=change.perform().after)
        refused += bool(why)
    return refused


def _changes(way: Way, workspace: Workspace) -> list[Prepared]:
    with Workspace(way.folder / "workspace") as copy:
        before, after = workspace.files(), copy.files()
        changed = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
        new = {path: copy.read(path) for path in changed if path in after}

    def change(path: str) -> Prepared:
        old, digest = before.get(path, ""), after.get(path, "")

        def perform() -> Outcome:
            if path in new:
                workspace.write(path, new[path], old)
            else:
                workspace.remove(path, old)
            return Outcome("", 0, digest)

        return Prepared(f"take {path} of {way.folder.name}", perform, before=old, after=digest)

    return [change(path) for path in changed]


def _forked(log: Log, workspace: Workspace, name: str) -> Path:
    """A way's folder: the log so far, its results, and a copy of the workspace. A kill may have left one."""
    folder = log.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    outside = shutil.ignore_patterns(*LEFT_OUT)
    shutil.copytree(workspace.root, folder / "workspace", symlinks=True, ignore=outside)
    for own in (LOG, HEAD):
        shutil.copy(log.folder / own, folder / own)
    if (log.folder / "results").is_dir():
        shutil.copytree(log.folder / "results", folder / "results")
    return folder


def _tried(log: Log, folder: Path, hint: str, start: Start, check: Check) -> Way:
    """Go on in a way's folder to the end, and judge what is there then; ``log`` has a line of it."""
    with Log(folder) as own, Workspace(folder / "workspace") as copy:
        agent, before = start(own, copy), len(own.records)
        agent.hint(hint)
        ended, head = agent.run(), own.head
        first = next((one for one in own.records[before:] if "prompt_tokens" in one), {})
    is_right = _judged(folder, check)
    about = {"hint": hint, "folder": folder.name, "head": head, "is_right": is_right}
    log.append("way", **about, worked_s=ended["worked_s"])
    counts = first.get("prompt_tokens", 0), first.get("cached_tokens", 0)
    return Way(hint, ended, is_right, agent.steps, *counts, folder)


def _judged(folder: Path, check: Check) -> bool:
    """Whether the check holds in a copy of the way's copy: what it writes is none of the way's work."""
    with TemporaryDirectory(dir=folder) as place:
        shutil.copytree(folder / "workspace", place, symlinks=True, dirs_exist_ok=True)
        with Workspace(Path(place)) as copy:
            return check(copy)
