"""Owns what an action is: a tool's name and arguments, as a schema, as calls, and checked.

An action of our own engine is drawn under a grammar made of these schemas. One of another's server is
checked here all the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tiny_llm.errors import RequestError, did_you_mean

FINISH = "finish"


class Arguments(BaseModel):
    """Arguments of one tool: all of them given, none beside them."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _Answer(Arguments):
    answer: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an action; ``after`` is the digest of what it changed, or may have."""

    text: str
    exit: int | None = None
    after: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An action that could be carried out now: ``what`` in a line, and all of it in ``preview``.

    ``before`` is the digest of what it will change, ``after`` what that becomes, where it is known.
    """

    what: str
    perform: Callable[[], Outcome]
    preview: str = ""
    before: str = ""
    after: str = ""


@dataclass(frozen=True, slots=True)
class AgentTool:
    """One kind of action. ``prepare`` raises RequestError for what cannot be done; nothing is done yet.

    ``has_effect``: the user is asked first. ``digest`` is of what arguments would change, as it is now.
    ``checked`` is what the arguments must be; None: whoever carries the action out checks them.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    prepare: Callable[[Any], Prepared]
    has_effect: bool = False
    digest: Callable[[Any], str] = lambda _: ""
    checked: type[Arguments] | None = None

    @classmethod
    def of(
        cls, name: str, description: str, checked: type[Arguments], prepare: Any, **more: Any
    ) -> AgentTool:
        """A tool whose arguments are ``checked``."""
        return cls(name, description, schema_of(checked), prepare, checked=checked, **more)

    def arguments(self, given: object) -> Any:
        """The arguments as ``prepare`` takes them. Raises RequestError."""
        if not isinstance(given, dict):
            raise RequestError(f"{self.name}: the arguments are {given!r}, but must be an object.")
        if self.checked is None:
            return given
        try:
            return self.checked.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise RequestError(f"{self.name}: {where}: {first['msg']}.") from error


@dataclass(frozen=True, slots=True)
class Actions:
    """All that a run may do."""

    tools: Sequence[AgentTool]
    by_name: Mapping[str, AgentTool] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {tool.name: tool for tool in self.tools})

    def find(self, action: Mapping[str, Any]) -> tuple[AgentTool, Any]:
        """The tool of {"name": ..., "arguments": {...}}, and its arguments. Raises RequestError."""
        name = action.get("name")
        tool = self.by_name.get(name) if isinstance(name, str) else None
        if tool is None:
            known = ", ".join(self.by_name) or "none"
            hint = did_you_mean(str(name), self.by_name)
            raise RequestError(f"There is no action {name!r}, but: {known}.{hint}")
        return tool, tool.arguments(action.get("arguments"))

    def calls(self) -> list[dict[str, Any]]:
        """The tools as chat templates and OpenAI have them."""
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": dict(tool.parameters),
                    "strict": True,
                },
            }
            for tool in self.tools
        ]

    def schema(self) -> dict[str, Any]:
        """An answer that is one action, {"thought": ..., "action": {"name": ..., "arguments": ...}}."""
        finish = AgentTool.of(FINISH, "", _Answer, None)
        action = {"anyOf": [_object(_named(tool)) for tool in (*self.tools, finish)]}
        return _object({"thought": {"type": "string", "description": "why, in a sentence"}, "action": action})

    def listed(self) -> str:
        """The tools as text, for models whose template shows none."""
        lines = [f"- {t.name}: {t.description} Arguments: {json.dumps(t.parameters)}" for t in self.tools]
        return "\n".join([*lines, f'- {FINISH}: End with {{"answer": the answer to the user}}.'])


def schema_of(checked: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of arguments, without what says nothing to a model."""
    schema = checked.model_json_schema()
    own = {
        name: {key: value for key, value in one.items() if key != "title"}
        for name, one in schema.get("properties", {}).items()
    }
    return _object(own)


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    required = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": dict(properties), **required}


def _named(tool: AgentTool) -> dict[str, Any]:
    """The properties of an action. One whose schema has references is left to its server."""
    parameters = tool.parameters if "$ref" not in json.dumps(tool.parameters) else {"type": "object"}
    return {"name": {"type": "string", "enum": [tool.name]}, "arguments": dict(parameters)}
