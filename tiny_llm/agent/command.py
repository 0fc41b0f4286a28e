"""Owns running a command of the user's: one that was allowed, without a shell, within limits, and its end.

The network is cut, and what a command leaves running is ended with it, by namespaces of Linux: `unshare`.
Where there are none, a command runs only if the user has allowed the network, and what has left its process
group lives on. A command is not kept in the workspace: it can read and write all that its user can.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

from pydantic import Field, create_model

from tiny_llm.agent.action import AgentTool, Arguments, Outcome, Prepared
from tiny_llm.agent.workspace import Workspace, tree_digest
from tiny_llm.errors import ConfigError, RequestError

MORE = "..."
_NAMESPACES = ("unshare", "--user", "--map-current-user", "--net", "--pid", "--fork", "--kill-child")
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV")
"""What a command sees of our environment: no keys."""
_WITH_LIMITS = """
import json, os, resource, sys
for name, most in json.loads(sys.argv[1]).items():
    hard = resource.getrlimit(getattr(resource, name))[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(getattr(resource, name), (most, most))
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


@dataclass(frozen=True, slots=True)
class CommandLimits:
    """Of one command: seconds, bytes of each file it writes and of its output, processes (not root's).

    Of the output, which is such a file, the first ``shown`` bytes are kept.
    """

    seconds: float = 60.0
    file: int = 2**26
    shown: int = 2**20
    processes: int = 256


def command_tool(
    workspace: Workspace, allowed: Sequence[str], *, network: bool, limits: CommandLimits
) -> AgentTool:
    """The action that runs one of the ``allowed`` commands: as it is, or with more arguments after "...".

    Which one is a choice among these, so that no other can be drawn. Raises ConfigError for what is none.
    """
    known = {text: _split(text) for text in allowed}
    more = Field(max_length=32, description=f"for a command that ends in {MORE}; else []")
    fields: Any = {"command": (cast(Any, Literal)[tuple(known)], ...), "arguments": (list[str], more)}

    def prepare(given: Any) -> Prepared:
        argv = list(known[given.command])
        if argv[-1] == MORE:
            argv[-1:] = given.arguments
        elif given.arguments:
            raise RequestError(f"{given.command!r} is allowed as it is, without more arguments: give [].")
        before = workspace.files()

        def perform() -> Outcome:
            ran = run(argv, workspace, network=network, limits=limits)
            after = workspace.files()
            changed = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
            names = f"\n[changed: {', '.join(changed)[:1000]}]" if changed else ""
            return Outcome(f"[exit {ran.exit}]\n{ran.text}{names}", ran.exit, tree_digest(after))

        told = f"{'with' if network else 'without'} the network, {limits.seconds:g} s at most"
        return Prepared(f"run {shlex.join(argv)}", perform, told, tree_digest(before))

    def digest(_: Any) -> str:
        return tree_digest(workspace.files())

    arguments = create_model("_Command", __base__=Arguments, **fields)
    told = "Run one of the allowed commands."
    return AgentTool.of("run", told, arguments, prepare, has_effect=True, digest=digest)


def run(argv: Sequence[str], workspace: Workspace, *, network: bool, limits: CommandLimits) -> Outcome:
    """Run ``argv`` in the workspace; all that it started is ended when this returns.

    What it printed is the text; an exit code is negative for a signal. Raises RequestError where the network
    cannot be cut, and is not allowed.
    """
    if not (isolated := can_isolate()) and not network:
        raise RequestError("The network cannot be cut here, so no command runs; --network leaves it on.")
    inner = [name for name in _NAMESPACES if not (network and name == "--net")] if isolated else []
    bounds = {"RLIMIT_FSIZE": limits.file, "RLIMIT_CORE": 0}
    if isolated:  # else it would count all processes of the user
        bounds["RLIMIT_NPROC"] = limits.processes
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*inner, sys.executable, "-I", "-S", "-c", _WITH_LIMITS, json.dumps(bounds), *argv],
            cwd=workspace.root,
            env={name: os.environ[name] for name in _KEPT if name in os.environ} | {"TERM": "dumb"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        stopped = ""
        try:
            process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            stopped = f"\n[stopped: it took longer than {limits.seconds:g} s]"
        finally:
            with suppress(ProcessLookupError, PermissionError):  # nobody of the group is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        size = output.seek(0, os.SEEK_END)
        output.seek(0)
        text = output.read(limits.shown).decode(errors="replace").rstrip("\n")
    cut = f"\n[cut: {size:,} bytes of output]" if size > limits.shown else ""
    return Outcome(text + cut + stopped, process.returncode)


@cache
def can_isolate() -> bool:
    """Whether a command can have namespaces of its own here, tried once."""
    if shutil.which(_NAMESPACES[0]) is None:
        return False
    return subprocess.run([*_NAMESPACES, "true"], capture_output=True, check=False).returncode == 0


def _split(text: str) -> list[str]:
    try:
        argv = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"The allowed command {text!r} cannot be read: {error}.") from error
    if not argv or argv == [MORE]:
        raise ConfigError('An allowed command is empty; give one such as "python -m pytest -q ...".')
    return argv
