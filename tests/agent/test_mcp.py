"""Tools of an MCP server that really runs: those that are allowed, asked for, with receipts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tiny_llm.agent.action import Actions
from tiny_llm.agent.loop import Agent, Budget, begin
from tiny_llm.agent.mcp_tools import McpServer
from tiny_llm.agent.receipts import Log
from tiny_llm.errors import ConfigError, RequestError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("mcp") is None, reason="needs the package mcp"),
]
COMMAND = f"{sys.executable} {Path(__file__).with_name('mcp_server.py')}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[McpServer]:
    with McpServer(COMMAND, tmp_path_factory.mktemp("mcp") / "log", 120) as one:
        yield one


def test_a_run_with_its_tools(bench: Any, server: McpServer) -> None:
    assert server.names == ["lookup", "secret", "leave"]
    actions = Actions(server.tools(["lookup"]))
    says = [
        ("lookup", {"query": "height of Oslo"}),
        ("secret", {"query": "height of Oslo"}),
        ("lookup", {"question": 3}),
        "The height of Oslo is 23.",
    ]
    with Log(bench.folder) as log:
        begin(log, "How high is Oslo?")
        model = bench.scripted(says)
        run = Agent(log, actions, model, Budget(), lambda p: bench.asked.append(p) or "", bench.noted.append)
        assert run.run()["reason"] == "finished"
    assert bench.receipts()[0]["shown"] == "23"
    assert "no action 'secret'" in model.seen[2].steps[1].shown, "it is there, and was not allowed"
    assert bench.receipts()[1]["exit"] == 1 and "query" in bench.receipts()[1]["shown"]
    assert [one.what.split()[0] for one in bench.asked] == ["lookup", "lookup"]
    intents = [one for one in bench.noted if one["kind"] == "intent"]
    assert len(intents) == 2, "what a server does is not known: each call is an effect"


def test_what_a_server_says_of_itself_is_bounded(server: McpServer) -> None:
    (tool,) = server.tools(["secret"])
    assert len(tool.description) == 500


@pytest.mark.parametrize("command", ["no-such-program", f"{sys.executable} -c pass", ""])
def test_a_server_that_does_not_come_up(tmp_path: Path, command: str) -> None:
    with pytest.raises(ConfigError, match=r"does not come up: ."):
        McpServer(command, tmp_path / "log", 60)


def test_a_server_that_goes_away(tmp_path: Path) -> None:
    with McpServer(COMMAND, tmp_path / "log", 120) as server:
        (leave,) = server.tools(["leave"])
        for _ in range(2):
            with pytest.raises(RequestError, match=r"leave: its server .* failed: ."):
                leave.prepare({}).perform()
