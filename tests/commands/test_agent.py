"""``agent`` as it is called: the bundled model, a server by HTTP, a terminal in which it asks."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tiny_llm.agent.command import can_isolate
from tiny_llm.agent.receipts import read_log
from tiny_llm.cli import main

ROOT = Path(__file__).resolve().parents[2]
EDIT = ("edit", {"path": "a.py", "old": "1", "new": "2"})


class Speaking(HTTPServer):
    """A server of OpenAI's kind that says ``says``, one after the other, and notes what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Speaker)
        self.says: list[Any] = []
        self.asked: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Speaker(BaseHTTPRequestHandler):
    server: Speaking

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(
            {**json.loads(body), "path": self.path, "key": self.headers["Authorization"]}
        )
        said = self.server.says.pop(0)
        if isinstance(said, tuple):
            said = {"thought": "so", "action": {"name": said[0], "arguments": said[1]}}
        text = said if isinstance(said, str) else json.dumps(said)
        told = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(told | {"usage": {"prompt_tokens": 9, "completion_tokens": 5}}).encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Speaking]:
    with Speaking() as one:
        thread = threading.Thread(target=one.serve_forever, daemon=True)
        thread.start()
        yield one
        one.shutdown()
        thread.join()


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``call(*arguments)``: exit code, stdout, stderr, in a workspace with a.py; the log is in run."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "a.py").write_text("x = 1\n")

    def called(*arguments: str) -> tuple[int, str, str]:
        place = (
            [] if "--resume" in arguments else ["-w", str(tmp_path / "work"), "--run", str(tmp_path / "run")]
        )
        code = main(["agent", *arguments, *place])
        return code, *capsys.readouterr()

    return called


@pytest.mark.slow
def test_the_bundled_model_computes(call: Any, tmp_path: Path) -> None:
    code, out, err = call("What is 37 * 12?", "--actions", "calculator")
    assert (code, out) == (0, "37 * 12 = 444\n")
    assert "✓  1 calculator 37 * 12" in err
    again = call("What is 40 + 2?", "--actions", "calculator", "--resume", str(tmp_path / "run"), "--json")
    told = json.loads(again[1])
    assert told["answer"] == "40 + 2 = 42" and told["head"] == read_log(tmp_path / "run")[-1]["digest"]


def test_a_server_by_http(
    call: Any, server: Speaking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key-1")
    server.says = [EDIT, "no JSON", ("launch", {}), ("finish", {"answer": "x is 2 now"})]
    options = ["--server", server.url, "-m", "big", "--approve", "always"]
    code, out, err = call("Make x 2.", *options)
    assert (code, out) == (0, "x is 2 now\n")
    assert (tmp_path / "work" / "a.py").read_text() == "x = 2\n"
    assert "-x = 1" in err and "+x = 2" in err and "no valid action" in err
    first = server.asked[0]
    assert (first["path"], first["key"], first["model"]) == ("/v1/chat/completions", "Bearer key-1", "big")
    assert first["response_format"]["type"] == "json_schema"
    assert "launch" in server.asked[3]["messages"][-1]["content"], "a fault is told"


def test_never_does_nothing(call: Any, server: Speaking, tmp_path: Path) -> None:
    server.says = [EDIT, ("finish", {"answer": "not done"})]
    assert call("Make x 2.", "--server", server.url, "--approve", "never")[0] == 0
    assert (tmp_path / "work" / "a.py").read_text() == "x = 1\n"
    assert "allows no effects" in server.asked[1]["messages"][-1]["content"]


def test_without_a_terminal_nobody_is_asked(call: Any, server: Speaking, tmp_path: Path) -> None:
    server.says = [EDIT, ("finish", {"answer": "not done"})]
    call("Make x 2.", "--server", server.url)
    assert (tmp_path / "work" / "a.py").read_text() == "x = 1\n"
    assert "there is no terminal" in server.asked[1]["messages"][-1]["content"]


def test_a_run_that_stopped_has_a_code_of_its_own_and_goes_on(
    call: Any, server: Speaking, tmp_path: Path
) -> None:
    server.says = [EDIT, ("finish", {"answer": "done"})]
    options = ["--server", server.url, "--approve", "always"]
    code, _, err = call("Make x 2.", *options, "--steps", "1")
    assert code == 3 and "--steps" in err
    assert call(*options, "--resume", str(tmp_path / "run"))[:2] == (0, "done\n")


@pytest.mark.slow
def test_two_ways_and_a_check(call: Any, server: Speaking, tmp_path: Path) -> None:
    done = ("finish", {"answer": "done"})
    server.says = [("edit", {"path": "a.py", "old": "1", "new": "3"}), done, EDIT, done]
    ways = ["--way", "Three!", "--way", "Two!", "--check", "grep 2 a.py"]
    network = [] if can_isolate() else ["--network"]
    code, out, _ = call("Change x.", "--server", server.url, "--approve", "always", *ways, *network, "--json")
    told = json.loads(out)
    assert code == 0 and [(way["hint"], way["is_right"]) for way in told["ways"]] == [
        ("Two!", True),
        ("Three!", False),
    ]
    assert (tmp_path / "work" / "a.py").read_text() == "x = 2\n"
    assert server.asked[0]["messages"][1]["content"] == "Change x.\n\nThree!"


@pytest.mark.slow
@pytest.mark.parametrize(("typed", "after"), [("y", "x = 2\n"), ("not like that", "x = 1\n")])
def test_a_terminal_asks(server: Speaking, tmp_path: Path, typed: str, after: str) -> None:
    """In a real terminal: the diff, the question, and what the user types. Escapes of a file are not run."""
    work = tmp_path / "work"
    work.mkdir()
    odd = "[red]a.py"  # no markup, where the user is to see what it is
    (work / odd).write_text("x = 1\n")
    (work / "b").write_text("\x1b[2J\x1b]0;owned\x07")
    look = ("read", {"path": "b", "first": 1, "last": 2})
    server.says = [look, ("edit", {**EDIT[1], "path": odd}), ("finish", {"answer": "the end"})]
    options = ["-w", str(work), "--run", str(tmp_path / "run"), "--server", server.url]
    command = ["main.py", "agent", "Make x 2.", *options]
    child = pexpect.spawn(sys.executable, command, cwd=str(ROOT), timeout=120, dimensions=(40, 100))
    try:
        child.expect_exact("Allow it?")
        shown = child.before.decode()
        assert "x = 1" in shown and "x = 2" in shown and f"edit {odd}" in shown
        assert "\x1b[2J" not in shown and "\x1b]0;" not in shown
        child.sendline(typed)
        child.expect(pexpect.EOF)
        assert b"the end" in child.before
    finally:
        child.close(force=True)
    assert (work / odd).read_text() == after
    if typed.startswith("not"):
        assert "the user said no. not like that" in server.asked[2]["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "There is no task"),
        (["x", "--actions", "raed"], "Did you mean 'read'"),
        (["x", "--allow", ""], "allowed command is empty"),
        (["x", "--way", "y"], "--way and --check go together"),
        (["x", "--server", "file:///etc/passwd"], "must be like http"),
        (["x", "--server", "http://127.0.0.1:1/v1"], "gave no answer"),
        (["x", "--mcp", "true"], "does not come up"),
        (["x", "--mcp-tool", "a"], "no such tool"),
        (["--resume", "nowhere"], "There is no run in nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(call: Any, arguments: list[str], why: str) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and why in err and err.count("\n") == 1, err


def test_a_run_in_its_own_workspace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["agent", "x", "-w", str(tmp_path), "--run", str(tmp_path / "run")]) == 2
    assert "lies in the workspace" in capsys.readouterr().err


def test_a_log_that_was_edited_does_not_go_on(call: Any, server: Speaking, tmp_path: Path) -> None:
    server.says = [EDIT, ("finish", {"answer": "done"})]
    call("Make x 2.", "--server", server.url, "--approve", "always")
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text().replace("edit a.py", "edit b.py"))
    code, _, err = call("--resume", str(tmp_path / "run"), "--server", server.url)
    assert code == 2 and "was changed, added or removed" in err
