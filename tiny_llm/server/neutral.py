"""Owns which fields are taken where their value asks for nothing, so that nothing changes by it.

Routers and SDKs fill in what other servers know, at its default. That is no reason to refuse a request; any
other value in such a field is, and is refused by its path. A body that has such a field itself goes by that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

AnyModel = TypeVar("AnyModel", bound=BaseModel)
Values: TypeAlias = tuple[Any, ...]  # those of a field that ask for nothing

REQUEST: Mapping[str, Values] = {
    # OpenAI's
    "background": (False,),
    "best_of": (1,),
    "modalities": (["text"],),
    "prompt_cache_retention": ("in-memory", "in_memory"),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "verbosity": ("medium",),
    # of vLLM and SGLang, which their routers fill in
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "no_stop_trim": (False,),
    "return_hidden_states": (False,),
    "return_logprob": (False,),
    "return_token_ids": (False,),
    "separate_reasoning": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stream_reasoning": (True,),
    "use_beam_search": (False,),
}
"""Of a request, whatever its route."""

STREAM_OPTIONS: Mapping[str, Values] = {"include_obfuscation": (False,)}
TEXT_OPTIONS: Mapping[str, Values] = {"verbosity": ("medium",)}
REASONING_OPTIONS: Mapping[str, Values] = {"summary": ("auto",)}


def misplaced(within: Sequence[str | int], message: str, *, code: str = "invalid_value") -> Exception:
    """What a validator raises for a fault that lies ``within`` its value: in ``[0, "type"]``, for example."""
    return PydanticCustomError("misplaced", "{message}", {"message": message, "within": within, "code": code})


def with_neutral(fields: Mapping[str, Values]) -> Callable[[type[AnyModel]], type[AnyModel]]:
    """A class decorator: the body takes ``fields`` too, at their neutral values."""
    kinds = {name: (_neutral_kind(values), None) for name, values in fields.items()}
    return lambda body: with_fields(body, kinds)


def with_fields(body: type[AnyModel], fields: Mapping[str, Any]) -> type[AnyModel]:
    """``body`` with further ``fields``, each a type and a default, as if its class had them."""
    about: dict[str, Any] = {"__module__": body.__module__, "__doc__": body.__doc__}
    return create_model(body.__name__, __base__=body, **about, **fields)


def _neutral_kind(values: Values) -> Any:
    """A field's type in pydantic's words."""

    def checked(given: Any) -> Any:
        if any(given == value and isinstance(given, bool) == isinstance(value, bool) for value in values):
            return given
        allowed = " or ".join(json.dumps(value) for value in values)
        what = f"{_short(given)} is not supported here; {allowed} is taken, as it asks for nothing"
        raise misplaced([], what, code="unsupported_field")

    return Annotated[Any, AfterValidator(checked), WithJsonSchema({"enum": list(values)})]


def _short(given: Any) -> str:
    """A value as JSON, or its beginning; of a list or an object only that it is one: it may be large."""
    if isinstance(given, list | dict) and given:
        return "an array" if isinstance(given, list) else "an object"
    return json.dumps(given[:80] if isinstance(given, str) else given, ensure_ascii=False)[:80]
