"""Owns running a command of the user's: one that was allowed, without a shell, within limits, and its end.

The network is cut, and what a command leaves running is ended with it, by namespaces of Linux: `unshare`.
Where there are none, a command runs only if the user has allowed the network, and what has left its process
group lives on. A command is not kept in the workspace: it can read and write all that its user can.
"""

from __future__ import annotations

import json
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import IO, Annotated, Any, Literal, cast

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
    """Of one command: seconds, bytes of its output and of each file it writes, processes (not root's)."""

    seconds: float = 60.0
    output: int = 2**20
    file: int = 2**26
    processes: int = 256


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command printed, and how it ended: ``exit`` is negative for a signal, ``stopped`` why by us."""

    text: str
    exit: int
    stopped: str = ""


def command_tool(
    workspace: Workspace, allowed: Sequence[str], *, network: bool, limits: CommandLimits
) -> AgentTool:
    """The action that runs one of the ``allowed`` commands: as it is, or with more arguments after "...".

    Raises ConfigError for a command that cannot be read.
    """
    known = {text: _split(text) for text in allowed}
    arguments = _arguments(tuple(known))

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
            ends = [f"[stopped: {ran.stopped}]"] if ran.stopped else []
            ends += [f"[changed: {', '.join(changed)[:1000]}]"] if changed else []
            text = "\n".join([f"[exit {ran.exit}]", ran.text.rstrip("\n"), *ends])
            return Outcome(text, ran.exit, tree_digest(after))

        return Prepared(f"run {shlex.join(argv)}", perform, before=tree_digest(before))

    what = "Run one of the allowed commands."
    return AgentTool.of(
        "run", what, arguments, prepare, has_effect=True, digest=lambda _: tree_digest(workspace.files())
    )


def run(argv: Sequence[str], workspace: Workspace, *, network: bool, limits: CommandLimits) -> Ran:
    """Run ``argv`` in the workspace; all that it started is ended when this returns.

    Raises RequestError where the network cannot be cut, and is not allowed.
    """
    if not (isolated := can_isolate()) and not network:
        raise RequestError(
            "The network cannot be cut here (no `unshare`), so no command runs; --network allows it."
        )
    inner = [name for name in _NAMESPACES if not (network and name == "--net")] if isolated else []
    bounds = {"RLIMIT_FSIZE": limits.file, "RLIMIT_CORE": 0}
    if isolated:  # else it would count all processes of the user
        bounds["RLIMIT_NPROC"] = limits.processes
    process = subprocess.Popen(
        [*inner, sys.executable, "-I", "-S", "-c", _WITH_LIMITS, json.dumps(bounds), *argv],
        cwd=workspace.root,
        env={name: os.environ[name] for name in _KEPT if name in os.environ} | {"TERM": "dumb"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None, "it is a pipe"
    try:
        data, stopped = _output(process, process.stdout, limits)
    finally:
        with suppress(ProcessLookupError):  # nobody of the group is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    return Ran(data.decode(errors="replace"), process.returncode, stopped)


@cache
def can_isolate() -> bool:
    """Whether a command can have namespaces of its own here, tried once."""
    if shutil.which(_NAMESPACES[0]) is None:
        return False
    return subprocess.run([*_NAMESPACES, "true"], capture_output=True, check=False).returncode == 0


def _output(process: subprocess.Popen[bytes], pipe: IO[bytes], limits: CommandLimits) -> tuple[bytes, str]:
    """What comes until the command ends, and why it was stopped if it was.

    The pipe may stay open beyond that: what the command left behind may hold it.
    """
    data, deadline = b"", time.monotonic() + limits.seconds
    os.set_blocking(pipe.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None
            ready = selector.select(0 if ended else min(0.05, max(0.0, deadline - time.monotonic())))
            piece = pipe.read1(2**16) if ready else b""  # type: ignore[attr-defined]
            data += piece or b""
            if len(data) > limits.output:
                return data[: limits.output], f"more than {limits.output:,} bytes of output"
            if ended and not piece:
                return data, ""
            if ready and not piece:  # it closed its output, and may go on
                selector.unregister(pipe)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
                    return data, ""
            if time.monotonic() >= deadline:
                return data, f"it took longer than {limits.seconds:g} s"


def _split(text: str) -> list[str]:
    try:
        argv = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"The allowed command {text!r} cannot be read: {error}.") from error
    if not argv or argv == [MORE]:
        raise ConfigError('An allowed command is empty; give one such as "python -m pytest -q ...".')
    return argv


def _arguments(allowed: tuple[str, ...]) -> type[Arguments]:
    """The arguments of ``run``: which command is a choice among those allowed, so no other can be drawn."""
    choice = cast(Any, Literal)[allowed]
    more: Any = Annotated[
        list[str], Field(max_length=32, description=f"for a command that ends in {MORE}; else []")
    ]
    fields: Mapping[str, Any] = {"command": (choice, ...), "arguments": (more, ...)}
    return create_model("_Command", __base__=Arguments, **fields)
