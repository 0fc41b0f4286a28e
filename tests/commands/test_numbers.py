"""Every option that takes a number: any value works, or is refused by an error that names the option."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from dataclasses import fields
from types import ModuleType
from typing import get_args

import pytest

from tiny_llm import cli
from tiny_llm.commands import bench, generate, serve
from tiny_llm.options import EngineOptions
from tiny_llm.planning import commands as memory
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.server.service import Service

WHOLE = ("-5", "0", "1", "300", str(10**9), str(2**31), "1" + 30 * "0", "-1" + 30 * "0")
NUMBERS = (*WHOLE, "nan", "inf", "-inf", "1e-320", "1e308")
AMOUNTS = ("0", "-1", "nan", "inf", "1", "100TB", 400 * "9" + "GB")


def numeric(module: ModuleType) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The options of a command that take a number, and values to be tried."""
    (command,) = module.app.registered_commands
    for name, parameter in inspect.signature(command.callback, eval_str=True).parameters.items():
        kind, option = get_args(parameter.annotation)[:2]
        declared = [name for name in option.param_decls or () if name.startswith("--")]
        flag = declared[0] if declared else "--" + name.replace("_", "-")
        if int in (kind, *get_args(kind)):
            yield flag, WHOLE
        elif float in (kind, *get_args(kind)):
            yield flag, NUMBERS
        elif name in ("kv_memory", "swap_memory", "memory"):
            yield flag, AMOUNTS


ENGINE = {"--" + field.name.replace("_", "-") for field in fields(EngineOptions)}
"""Options of every command that makes an engine: tried with one of them."""
COMMANDS: dict[str, tuple[ModuleType, list[str]]] = {
    "generate": (generate, ["--prompt", "a", "--raw", "--json", "-n", "2"]),
    "serve": (serve, []),
    "bench": (bench, ["--prompt-tokens", "2", "--new-tokens", "2", "--rounds", "1"]),
    "memory": (memory, []),
}
CASES = [
    (name, flag, value)
    for name, (module, _) in COMMANDS.items()
    for flag, values in numeric(module)
    if name == "serve" or flag not in ENGINE
    for value in values
    if flag != "--rounds" or int(value) <= 1  # as many as are asked for are measured
]


def ask_once(services: list[Service], *_: object) -> None:
    """Instead of serving for ever."""
    assert services[0].settings.max_in_flight >= 1
    engine = services[0].load()
    (answer,) = asyncio.run(engine.generate("a", SamplingParams(max_tokens=2)))
    engine.close()
    assert answer.error is None, answer.error


@pytest.mark.slow
@pytest.mark.parametrize(("command", "flag", "value"), CASES)
def test_a_number_works_or_is_refused_by_name(
    command: str, flag: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "run", ask_once)
    code = cli.main([command, *COMMANDS[command][1], f"{flag}={value}"])
    said = capsys.readouterr().err
    assert code in (0, 2), said
    assert code == 0 or flag.strip("-") in said.replace("_", "-"), f"which option was it? {said}"
