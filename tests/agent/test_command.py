"""Commands end: in time, with what they started, within their output; and have no network."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tiny_llm.agent import command as module
from tiny_llm.agent.action import Outcome
from tiny_llm.agent.command import CommandLimits, can_isolate, command_tool, run
from tiny_llm.agent.workspace import Workspace
from tiny_llm.errors import ConfigError, RequestError

isolated = pytest.mark.skipif(not can_isolate(), reason="needs `unshare` and user namespaces")


def ran(workspace: Workspace, script: str, **limits: Any) -> Outcome:
    bounds = CommandLimits(**limits)
    return run([sys.executable, "-c", script], workspace, network=not can_isolate(), limits=bounds)


def test_what_a_command_says_and_how_it_ends(workspace: Workspace) -> None:
    done = ran(workspace, "import os, sys; os.system('pwd'); sys.stderr.write('bad\\n'); sys.exit(3)")
    assert done == Outcome(f"{workspace.root}\nbad", 3)


def test_there_is_no_shell_and_no_key_in_the_environment(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    done = ran(workspace, "import os, sys; print(sorted(os.environ), sys.argv)")
    assert "OPENAI" not in done.text
    tool = command_tool(workspace, ["echo ..."], network=not can_isolate(), limits=CommandLimits())
    given = tool.arguments({"command": "echo ...", "arguments": ["$(id)", ";", "id", ">x", "`id`"]})
    assert "$(id) ; id >x `id`" in tool.prepare(given).perform().text


def test_endless_output_is_stopped(workspace: Workspace) -> None:
    done = ran(workspace, "while True: print('x' * 1000)", file=10**6, shown=50_000)
    assert done.text == f"{('x' * 1000 + chr(10)) * 49}{'x' * 951}\n[cut: 1,000,000 bytes of output]"
    assert done.exit != 0


def test_a_command_that_takes_too_long_is_stopped(workspace: Workspace) -> None:
    done = ran(workspace, "import time; print('a', flush=True); time.sleep(600)", seconds=1)
    assert done.text == "a\n[stopped: it took longer than 1 s]" and done.exit < 0


def test_one_that_closes_its_output_is_stopped_too(workspace: Workspace) -> None:
    done = ran(workspace, "import os, time; os.close(1); os.close(2); time.sleep(600)", seconds=1)
    assert done.text.endswith("[stopped: it took longer than 1 s]")


FORKS = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session={session})
while not os.path.exists("pid"): time.sleep(0.01)
"""
CHILD = """
import os, time
# In a namespace of its own a process has another number: its parent's /proc tells the outer one.
open("pid.half", "w").write(str(os.getpid())); os.rename("pid.half", "pid")
while True:
    open("alive", "w").write(str(time.time())); time.sleep(0.02)
"""


@pytest.mark.parametrize("session", [False, pytest.param(True, marks=isolated)])
def test_what_a_command_leaves_running_is_ended(workspace: Workspace, session: bool) -> None:
    """A child in its group; and with namespaces one that has left it. Neither writes any more."""
    done = ran(workspace, FORKS.format(child=CHILD, session=session))
    assert done == Outcome("", 0)
    last = (workspace.root / "alive").stat().st_mtime_ns
    time.sleep(0.3)  # a child that lived would write 15 times
    assert (workspace.root / "alive").stat().st_mtime_ns == last


def test_a_command_that_forks_without_end_is_ended(workspace: Workspace) -> None:
    """Each child makes one more and waits: 40 of them, then the time is over for all."""
    script = (
        "import os, time\n"
        "for n in range(40):\n"
        "    if os.fork(): break\n"
        "open(f'{n}', 'w').close()\n"
        "time.sleep(600)\n"
    )
    done = ran(workspace, script, seconds=3)
    assert done.text == "\n[stopped: it took longer than 3 s]"


@pytest.mark.skipif(os.geteuid() == 0, reason="the number of processes is not limited for root")
@isolated
def test_the_number_of_processes_is_limited(workspace: Workspace) -> None:
    done = ran(workspace, "import os\nfor n in range(50):\n    if not os.fork(): os.pause()", processes=20)
    assert "Resource temporarily unavailable" in done.text


def test_a_file_that_grows_is_stopped(workspace: Workspace) -> None:
    done = ran(workspace, "f = open('big', 'wb')\nwhile True: f.write(b'x' * 100000)", file=2**20)
    assert (workspace.root / "big").stat().st_size <= 2**20 and done.exit != 0


@isolated
def test_there_is_no_network(workspace: Workspace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5); print('through')"
        argv = [sys.executable, "-c", script]
        assert "through" not in run(argv, workspace, network=False, limits=CommandLimits()).text
        assert "through" in run(argv, workspace, network=True, limits=CommandLimits()).text


def test_where_the_network_cannot_be_cut_nothing_runs(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "can_isolate", lambda: False)
    with pytest.raises(RequestError, match="--network"):
        run(["touch", "a"], workspace, network=False, limits=CommandLimits())
    assert workspace.files() == {}
    assert run(["touch", "a"], workspace, network=True, limits=CommandLimits()).exit == 0


def test_only_allowed_commands_and_arguments(workspace: Workspace) -> None:
    tool = command_tool(workspace, ["cat a", "echo ..."], network=False, limits=CommandLimits())
    for given, why in (
        ({"command": "rm a", "arguments": []}, "Input should be 'cat a' or 'echo ...'"),
        ({"command": "cat a; id", "arguments": []}, "Input should be"),
        ({"command": "cat a", "arguments": ["b"]}, "without more arguments"),
        ({"command": "echo ...", "arguments": ["x"] * 33}, "at most 32"),
    ):
        with pytest.raises(RequestError, match=why):
            tool.prepare(tool.arguments(given))
    assert tool.parameters["properties"]["command"]["enum"] == ["cat a", "echo ..."]


def test_a_receipt_says_what_changed(workspace: Workspace) -> None:
    (workspace.root / "a").write_text("1")
    tool = command_tool(workspace, ["touch b"], network=not can_isolate(), limits=CommandLimits())
    ready = tool.prepare(tool.arguments({"command": "touch b", "arguments": []}))
    outcome = ready.perform()
    assert outcome.text == "[exit 0]\n\n[changed: b]" and outcome.exit == 0
    assert ready.before != outcome.after == tool.digest(None)


@pytest.mark.parametrize("text", ["", "...", "echo 'x"])
def test_a_command_that_is_none(workspace: Workspace, text: str) -> None:
    with pytest.raises(ConfigError, match="allowed command"):
        command_tool(workspace, [text], network=False, limits=CommandLimits())


def test_a_command_that_is_not_there(workspace: Workspace) -> None:
    done = run(["no-such-command"], workspace, network=not can_isolate(), limits=CommandLimits())
    assert done.exit == 1 and done.text == "no-such-command: No such file or directory"
    assert Path(workspace.root).is_dir()
