"""Owns ``python main.py agent``: a task in a folder, done by a model's actions, as the user allows them."""

from __future__ import annotations

import json as json_format
import os
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tiny_llm.agent.action import Actions, AgentTool
from tiny_llm.agent.calculator import calculator
from tiny_llm.agent.command import CommandLimits, command_tool, run
from tiny_llm.agent.files import file_tools
from tiny_llm.agent.fork import Start, keep, try_ways
from tiny_llm.agent.history import Proposing
from tiny_llm.agent.loop import Agent, Budget, begin
from tiny_llm.agent.mcp_tools import McpServer
from tiny_llm.agent.model import EngineModel, ServerModel
from tiny_llm.agent.receipts import LOG, Log
from tiny_llm.agent.results import Results
from tiny_llm.agent.terminal import Terminal
from tiny_llm.agent.workspace import Workspace
from tiny_llm.commands.grouped import grouped
from tiny_llm.commands.loading import load
from tiny_llm.commands.talking import ANSWER
from tiny_llm.errors import ConfigError, did_you_mean
from tiny_llm.options import ENGINE, DebugOption, EngineOptions, JsonOption, command_app, option
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.user_cache import user_cache, writable

app = command_app()
_NOT_FINISHED = 3


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """Where a run is, what it may do, and how much."""

    workspace: Annotated[
        Path, option("Bounds", "The folder that it may read and change.", "--workspace", "-w")
    ] = Path(".")
    approve: Annotated[
        Literal["never", "ask", "always"],
        option("Bounds", "Edits and commands: never do any, ask before each, or always do them."),
    ] = "ask"
    allow: Annotated[
        list[str] | None,
        option(
            "Bounds",
            'A command that it may run, as it is; "pytest -q ..." may have more arguments. Several times.',
        ),
    ] = None
    network: Annotated[bool, option("Bounds", "Leave commands the network.", "--network")] = False
    actions: Annotated[
        str | None, option("Bounds", "Only these, such as read,search,calculator; the default is all.")
    ] = None
    steps: Annotated[int, option("Budgets", "Actions at most.", min=1)] = 30
    tokens: Annotated[int, option("Budgets", "Tokens computed at most.", min=1)] = 200_000
    seconds: Annotated[float, option("Budgets", "Seconds at work at most.", min=1)] = 1800
    command_seconds: Annotated[float, option("Budgets", "Seconds a command may take.", min=0.1)] = 60
    mcp: Annotated[
        list[str] | None, option("Bounds", "An MCP server's command; it talks on stdin. Several times.")
    ] = None
    mcp_tool: Annotated[list[str] | None, option("Bounds", "A tool of one. Several times.")] = None
    way: Annotated[
        list[str] | None,
        option("Ways", "What to tell the model: each is tried in a copy of the workspace. Several times."),
    ] = None
    check: Annotated[
        str | None, option("Ways", "A command that exits with 0 where a way is right; the best is kept.")
    ] = None
    server: Annotated[
        str | None, option("Model", "A server of OpenAI's kind to ask instead; $OPENAI_API_KEY is its key.")
    ] = None
    run: Annotated[
        Path | None, option("Run", "A folder for the log; the default is a new one in the user's cache.")
    ] = None
    resume: Annotated[Path | None, option("Run", "Go on with the run whose log lies in this folder.")] = None


_GIVEN = AgentOptions()


@app.command()
@grouped("n", "logprobs", "prompt_logprobs")
def agent(
    task: Annotated[str | None, typer.Argument(help="What is to be done.")] = None,
    given: AgentOptions = _GIVEN,
    params: SamplingParams = ANSWER,
    options: EngineOptions = ENGINE,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Do a task in a folder, step by step: a model proposes, you allow, a log keeps what was done.

    It reads, searches and computes without asking. An edit shows its diff, a command its arguments, and
    waits for your word (--approve). Only commands that you name run: without a shell, without the network,
    for --command-seconds. They are not kept in the workspace: name such as you would run yourself.

    Steps go to stderr, the answer to stdout. Each run has a folder with its log, whose lines are chained by
    digests; killed at any moment, it goes on with --resume. Exit code 3: it stopped before an answer.

    [b]Examples[/b]

    agent "What is 37 * 12?" --actions calculator

    agent "Make the tests pass." -m qwen2.5-7b -w shop --allow "python -m pytest -q ..."

    agent "Why does it fail?" -w shop --approve never --server http://localhost:8000/v1 -m my-model
    """
    if bool(given.way) != bool(given.check):
        raise ConfigError("--way and --check go together: the best of the ways that pass is kept.")
    folder = _folder(given, task)
    terminal = Terminal(given.approve)
    budget = Budget(given.steps, given.tokens, given.seconds)
    with ExitStack() as opened:
        log = opened.enter_context(Log(folder))
        workspace = opened.enter_context(Workspace(_begun(log, task, given)))
        if folder.resolve().is_relative_to(workspace.root):
            raise ConfigError(f"The run's folder {folder} lies in the workspace; give --run another place.")
        outer = _mcp_tools(given, folder, opened)
        llm = load(options) if given.server is None else None

        def start(log: Log, workspace: Workspace) -> Agent:
            actions = _actions(given, workspace, log.folder, outer)
            model: Proposing
            if llm is None:
                model = _server(given, options, params, actions)
            else:
                model = EngineModel(llm, actions, params)
            return Agent(log, actions, model, budget, terminal.approve, terminal.show)

        if given.way:
            told = _best_way(log, workspace, given, start, terminal)
        else:
            going = start(log, workspace)
            if given.resume and task:
                going.hint(task)
            told = {**going.run(), "steps": going.steps, "tokens": going.tokens}
        head = log.head
    names = ("reason", "answer", "steps", "tokens", "worked_s", "ways")
    shown = {name: told[name] for name in names if name in told} | {"run": str(folder), "head": head}
    print(json_format.dumps(shown)) if json else terminal.close(shown)
    if told["reason"] != "finished":
        raise typer.Exit(_NOT_FINISHED)


def _best_way(
    log: Log, workspace: Workspace, given: AgentOptions, start: Start, terminal: Terminal
) -> dict[str, Any]:
    """Try all ways, and keep what the best has done, if it is right."""
    assert given.way is not None and given.check is not None, "they go together"
    argv, limits = shlex.split(given.check), CommandLimits(seconds=given.command_seconds)

    def check(copy: Workspace) -> bool:
        return run(argv, copy, network=given.network, limits=limits).exit == 0

    ways = try_ways(log, workspace, given.way, start, check)
    best, refused = ways[0], 0
    if best.is_right:
        refused = keep(best, log, workspace, terminal.approve)
    reason = "refused" if refused else best.ended["reason"] if best.is_right else "unsolved"
    rows = [
        {name: getattr(way, name) for name in ("hint", "is_right", "steps", "prompt_tokens", "shared_tokens")}
        for way in ways
    ]
    end = log.append(
        "end", reason=reason, answer=best.ended["answer"], ways=rows, worked_s=best.ended["worked_s"]
    )
    terminal.show(end)
    return {**end, "steps": sum(way.steps for way in ways)}


def _folder(given: AgentOptions, task: str | None) -> Path:
    """Where the run's log is, or will be."""
    if given.resume is not None:
        if not (given.resume / LOG).is_file():
            raise ConfigError(f"There is no run in {given.resume}: a run says at its end where its log is.")
        return given.resume
    if not task:
        raise ConfigError('There is no task; give one, such as agent "Find the port in config.toml".')
    if given.run is not None and (given.run / LOG).exists():
        raise ConfigError(f"There is a run in {given.run}; --resume goes on with it.")
    cache = user_cache()
    runs = writable(None if cache is None else cache / "agent")
    return given.run or runs / time.strftime(f"%Y%m%d-%H%M%S-{os.getpid()}")


def _begun(log: Log, task: str | None, given: AgentOptions) -> Path:
    """The workspace of a run that is begun now, or was before."""
    if not log.records:
        begin(log, str(task), workspace=str(given.workspace.resolve()))
    return Path(log.records[0]["workspace"])


def _mcp_tools(given: AgentOptions, folder: Path, opened: ExitStack) -> list[AgentTool]:
    """The tools of MCP servers that may be called. Raises ConfigError for one that none has."""
    limit, allowed = given.command_seconds, given.mcp_tool or []
    servers = [opened.enter_context(McpServer(one, folder / "mcp.log", limit)) for one in given.mcp or []]
    there = [name for server in servers for name in server.names]
    unknown = [name for name in allowed if name not in there]
    if unknown or bool(servers) != bool(allowed):
        what = f"{unknown[0]!r} is no such tool" if unknown else "--mcp and --mcp-tool go together"
        raise ConfigError(f"{what}; the servers of --mcp have: {', '.join(there) or 'none'}.")
    return [tool for server in servers for tool in server.tools(allowed)]


def _actions(given: AgentOptions, workspace: Workspace, folder: Path, outer: Sequence[AgentTool]) -> Actions:
    """The actions that the options leave."""
    tools = [*file_tools(workspace), calculator(), Results(folder / "results").tool()]
    if given.allow:
        limits = CommandLimits(seconds=given.command_seconds)
        tools.append(command_tool(workspace, given.allow, network=given.network, limits=limits))
    known = Actions([*tools, *outer])
    if given.actions is None:
        return known
    names = given.actions.split(",")
    for name in names:
        if name not in known.by_name:
            hint = did_you_mean(name, known.by_name)
            raise ConfigError(f"--actions: {name!r} is none of {', '.join(known.by_name)}.{hint}")
    return Actions([known.by_name[name] for name in names])


def _server(
    given: AgentOptions, options: EngineOptions, params: SamplingParams, actions: Actions
) -> ServerModel:
    room = (options.max_model_len or 16_384) - params.max_tokens
    key = os.environ.get("OPENAI_API_KEY", "none")
    return ServerModel(str(given.server), options.model, key, actions, params, room)
