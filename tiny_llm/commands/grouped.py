"""Owns how a command takes a whole dataclass: typer sees an option for each of its fields.

The fields of ``EngineOptions`` say themselves how they are shown; those of ``SamplingParams`` belong to all
fronts, and are put into typer's words here.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

import typer

from tiny_llm.errors import RequestError
from tiny_llm.sampling_params import OPTIONS, Option, SamplingParams


class Without(tuple[str, ...]):
    """Beside a dataclass in ``Annotated``: the fields that a command does not offer."""

    def __new__(cls, *names: str) -> Without:
        """Of these names."""
        return super().__new__(cls, names)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` as typer can read it: each dataclass among its parameters becomes an option a field.

    What is given comes together again in the dataclass, whose own checks then run; what the command is
    ``Without`` stays as the parameter's default has it.
    """
    signature = inspect.signature(command, eval_str=True)
    flat: list[inspect.Parameter] = []
    groups: dict[str, list[str]] = {}
    for parameter in signature.parameters.values():
        options = list(_options_of(parameter))
        if options:
            groups[parameter.name] = [option.name for option in options]
        flat += options or [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for group, names in groups.items():
            values = {name: given.pop(name) for name in names}
            given[group] = replace(signature.parameters[group].default, **values)
        command(**given)

    cast(Any, run).__signature__ = signature.replace(parameters=flat)
    return run


def _options_of(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """A parameter for each field of the dataclass that ``parameter`` takes; none if it takes none."""
    kind, without = parameter.annotation, Without()
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        without = next((one for one in more if isinstance(one, Without)), without)
    if not is_dataclass(kind):
        return
    offered = _of_sampling() if kind is SamplingParams else get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        if field.name in offered and field.name not in without:
            default = getattr(parameter.default, field.name)
            yield inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=list(default) if isinstance(default, tuple) else default,
                annotation=offered[field.name],
            )


def _of_sampling() -> dict[str, Any]:
    """The type that typer is to see for each sampling option."""
    return {name: _type_of(name, option) for name, option in OPTIONS.items()}


def _type_of(name: str, option: Option) -> Any:
    names = ["--" + name.replace("_", "-")]
    if option.letter:
        names.append(f"-{option.letter}")
    if option.shape == "by token":
        about = typer.Option(
            *names, help=option.help, parser=_json_object, metavar="JSON", rich_help_panel="Answer"
        )
        return Annotated[dict[str, float] | None, about]
    several = option.shape == "several"
    help = f"{option.help} May be given several times." if several else option.help
    kind: Any = list[option.kind] if several else option.kind  # type: ignore[name-defined]
    about = typer.Option(*names, help=help, rich_help_panel="Answer")
    return Annotated[kind | None if option.optional else kind, about]


def _json_object(text: str) -> dict[str, object]:
    try:
        read = json.loads(text)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise RequestError(f'{text!r} is not an object of JSON, such as {{"50": -100}}.')
    return read
