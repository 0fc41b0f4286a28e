"""Owns ``python main.py agent``: a task in a folder, done by a model's actions, as the user allows them."""

from __future__ import annotations

import json as json_format
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from tiny_llm.agent.action import Actions
from tiny_llm.agent.calculator import calculator
from tiny_llm.agent.command import CommandLimits, command_tool
from tiny_llm.agent.files import file_tools
from tiny_llm.agent.loop import Agent, Budget, begin
from tiny_llm.agent.model import EngineModel, Proposing, ServerModel
from tiny_llm.agent.receipts import Log
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
    folder = given.resume or given.run or _new_folder()
    with ExitStack() as opened:
        log = opened.enter_context(Log(folder))
        place = opened.enter_context(Workspace(_begun(log, task, given.workspace)))
        if folder.resolve().is_relative_to(place.root):
            raise ConfigError(f"The run's folder {folder} lies in the workspace; give --run another place.")
        actions = _actions(given, place, folder)
        terminal = Terminal(given.approve)
        budget = Budget(given.steps, given.tokens, given.seconds)
        model = _model(given.server, options, params, actions)
        going = Agent(log, actions, model, budget, terminal.approve, terminal.show)
        ended = going.run()
    figures = {"steps": going.steps, "tokens": going.tokens, "seconds": ended["worked_s"]}
    told = {"reason": ended["reason"], "answer": ended["answer"], **figures, "run": str(folder)}
    if json:
        print(json_format.dumps({**told, "head": log.head}))
    else:
        terminal.close(told, log.head)
    if ended["reason"] != "finished":
        raise typer.Exit(_NOT_FINISHED)


def _new_folder() -> Path:
    cache = user_cache()
    base = writable(None if cache is None else cache / "agent")
    return base / time.strftime(f"%Y%m%d-%H%M%S-{os.getpid()}")


def _begun(log: Log, task: str | None, workspace: Path) -> Path:
    """The workspace of a run that is begun now, or was before."""
    if log.records:
        return Path(log.records[0]["workspace"])
    if not task:
        raise ConfigError('There is no task; give one, such as agent "Find the port in config.toml".')
    begin(log, task, workspace=str(workspace.resolve()))
    return workspace


def _actions(given: AgentOptions, workspace: Workspace, folder: Path) -> Actions:
    """The actions that the options leave."""
    tools = [*file_tools(workspace), calculator(), Results(folder / "results").tool()]
    if given.allow:
        limits = CommandLimits(seconds=given.command_seconds)
        tools.append(command_tool(workspace, given.allow, network=given.network, limits=limits))
    known = Actions(tools)
    if given.actions is None:
        return known
    names = given.actions.split(",")
    for name in names:
        if name not in known.by_name:
            hint = did_you_mean(name, known.by_name)
            raise ConfigError(f"--actions: {name!r} is none of {', '.join(known.by_name)}.{hint}")
    return Actions([known.by_name[name] for name in names])


def _model(server: str | None, options: EngineOptions, params: SamplingParams, actions: Actions) -> Proposing:
    if server is None:
        return EngineModel(load(options), actions, params)
    room = options.max_model_len or 16_384
    key = os.environ.get("OPENAI_API_KEY", "none")
    return ServerModel(server, options.model, key, actions, params, room - params.max_tokens)
