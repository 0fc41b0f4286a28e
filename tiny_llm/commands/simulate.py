"""Owns ``python main.py simulate``: its options, a simulation for each policy, and what is shown of them."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from tiny_llm.commands.bar import Bar
from tiny_llm.commands.grouped import grouped
from tiny_llm.errors import RequestError, did_you_mean
from tiny_llm.options import DebugOption, JsonOption, command_app, option
from tiny_llm.planning.simulation.cluster import Cluster, Simulated
from tiny_llm.planning.simulation.costs import DEVICES, StepMs, costs_of, read_costs
from tiny_llm.planning.simulation.figures import ServedWell
from tiny_llm.planning.simulation.load import Load
from tiny_llm.planning.simulation.policy import Policy
from tiny_llm.planning.simulation.report import POOL, USERS, blocks_over_time, pool_over_time, table
from tiny_llm.planning.timeline import MOST_ROWS, draw

app = command_app()
LOAD, POLICY, LIMITS = Load(), Policy(), ServedWell()
MOST_RUNS = 64


@app.command()
@grouped()
def simulate(
    load: Load = LOAD,
    policy: Policy = POLICY,
    limits: ServedWell = LIMITS,
    vary: Annotated[
        list[str] | None,
        option(
            "Output",
            "What is compared, such as block-size=8,16,32 or memory=paged,first: a row each. "
            "May be given several times: all with all.",
        ),
    ] = None,
    model: Annotated[
        str, option("Costs", "A short name (see `models`), dense, in 16 bits.", "--model")
    ] = "qwen2-7b",
    device: Annotated[
        str, option("Costs", f"Whose published speeds count: {', '.join(DEVICES)}.")
    ] = "a100-40gb",
    costs: Annotated[
        Path | None, option("Costs", "A file of `bench --fit`: what steps took on a machine, for these two.")
    ] = None,
    svg: Annotated[
        Path | None, option("Output", "A folder for pictures: sequences, the pool and its blocks over time.")
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Try policies of serving without a model: the real scheduler and its blocks, and a clock.

    A load runs through them as fast as integers go. What a step takes is computed from a device's published
    speeds (--model, --device), or was measured here: `bench --fit costs.json`, then --costs costs.json.
    A trace may be far above what the device can do: then all wait. Lower the --rate.
    """
    what = read_costs(costs) if costs is not None else costs_of(model, device)
    found: dict[str, Simulated] = {}
    for name, own_load, own_policy in _varied(load, policy, vary or ()):
        found[name] = outcome = _run(what, own_load, own_policy, limits, svg is not None)
        if svg is not None:
            _draw(svg, name, outcome)
        if json:
            print(json_format.dumps({"policy": name, "costs": what.what, **outcome.row}), flush=True)
    if not json:
        console = Console()
        pool = policy.kv_tokens or what.kv_tokens
        console.print(f"{load.requests:,} requests · {what.what} · a pool of {pool:,} tokens")
        for columns in (USERS, POOL):
            console.print(table(columns, {name: outcome.row for name, outcome in found.items()}))


def _run(costs: StepMs, load: Load, policy: Policy, limits: ServedWell, draw: bool) -> Simulated:
    cluster = Cluster(policy, costs, limits, draw=draw, seed=load.seed)
    with Bar("Simulated") as bar:
        return cluster.run(
            load, lambda done: bar.show(done / load.requests, f"{done:,} of {load.requests:,}")
        )


def _draw(folder: Path, name: str, outcome: Simulated) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for what, picture in (
        ("pool", pool_over_time(outcome.samples)),
        ("blocks", blocks_over_time(outcome.samples)),
        ("timeline", draw(outcome.bars, MOST_ROWS)),
    ):
        called = "-".join([*name.replace("=", "-").split(), what])
        (folder / f"{called}.svg").write_text(picture, encoding="utf-8")


def _varied(load: Load, policy: Policy, vary: Sequence[str]) -> Iterator[tuple[str, Load, Policy]]:
    """Every combination of what is varied, by its name. Raises RequestError for what cannot be."""
    choices = [_choices(text, load, policy) for text in vary]
    combined = list(product(*choices))
    if len(combined) > MOST_RUNS:
        raise RequestError(f"--vary makes {len(combined)} simulations, but at most {MOST_RUNS} are run.")
    for chosen in combined:
        of_load, of_policy = (
            {name: value for kind, name, value in chosen if kind is side} for side in (Load, Policy)
        )
        called = " ".join(f"{name.replace('_', '-')}={value}" for _, name, value in chosen)
        yield called or "as asked", replace(load, **of_load), replace(policy, **of_policy)


def _choices(text: str, *sides: Any) -> list[tuple[Any, str, Any]]:
    name, _, values = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    kinds = {field.name: type(side) for side in sides for field in fields(side)}
    if name not in kinds or not values:
        shown = [one.replace("_", "-") for one in kinds]
        raise RequestError(
            f"--vary is {text!r}, but must be NAME=VALUE,VALUE with a name of: {', '.join(shown)}."
            f"{did_you_mean(name, shown)}"
        )
    hint = get_type_hints(kinds[name])[name]
    return [(kinds[name], name, _value(name, hint, value.strip())) for value in values.split(",")]


def _value(name: str, hint: Any, text: str) -> Any:
    try:
        return TypeAdapter(hint).validate_strings(text)
    except ValidationError as error:
        why = error.errors(include_url=False)[0]["msg"]
        raise RequestError(f"--vary {name.replace('_', '-')} has {text!r}: {why}.") from error
