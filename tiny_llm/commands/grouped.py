"""Owns how a command takes a whole dataclass: typer sees an option for each of its fields.

The fields of ``EngineOptions`` say themselves how they are shown; those of ``SamplingParams`` belong to all
fronts, and are put into typer's words here.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass, replace
from typing import Annotated, Any, cast, get_type_hints

from tiny_llm.errors import RequestError
from tiny_llm.options import option
from tiny_llm.sampling_params import OPTIONS, Option, SamplingParams


def grouped(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: a command as typer can read it. Each dataclass that it takes becomes an option a field.

    What is given comes together again in the dataclass, whose own checks then run. The fields ``without``
    are not offered, and stay as the parameter's default has them.
    """

    def made(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        flat: list[inspect.Parameter] = []
        groups: dict[str, list[str]] = {}
        for parameter in signature.parameters.values():
            options = [one for one in _options_of(parameter) if one.name not in without]
            if options:
                groups[parameter.name] = [one.name for one in options]
            flat += options or [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            for group, names in groups.items():
                values = {name: given.pop(name) for name in names}
                given[group] = replace(signature.parameters[group].default, **values)
            command(**given)

        cast(Any, run).__signature__ = signature.replace(parameters=flat)
        return run

    return made


def _options_of(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """A parameter for each field of the dataclass that ``parameter`` takes; none if it takes none."""
    kind = parameter.annotation
    if not is_dataclass(kind):
        return
    if kind is SamplingParams:
        types = {name: _type_of(name, given) for name, given in OPTIONS.items()}
    else:
        types = get_type_hints(kind, include_extras=True)
    for name, type_ in types.items():
        default = getattr(parameter.default, name)
        shown = list(default) if isinstance(default, tuple) else default
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=type_)


def _type_of(name: str, given: Option) -> Any:
    """The type that typer is to see for a sampling option."""
    names = ["--" + name.replace("_", "-")]
    if given.letter:
        names.append(f"-{given.letter}")
    if given.shape == "by token":
        about = option("Answer", given.help, *names, parser=_json_object, metavar="JSON")
        return Annotated[dict[str, float] | None, about]
    several = given.shape == "several"
    about = option("Answer", f"{given.help} May be given several times." if several else given.help, *names)
    kind: Any = list[given.kind] if several else given.kind  # type: ignore[name-defined]
    return Annotated[kind | None if given.optional else kind, about]


def _json_object(text: str) -> dict[str, object]:
    try:
        read = json.loads(text)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise RequestError(f'{text!r} is not an object of JSON, such as {{"50": -100}}.')
    return read
