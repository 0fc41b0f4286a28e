"""Owns whether a JSON schema can be satisfied by a value that ends: one that needs itself cannot."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any
from urllib.parse import unquote


def has_finite_value(schema: Mapping[str, Any]) -> bool:
    """Whether a finite value may satisfy ``schema``, as far as its references alone can forbid it.

    A reference is finite once its target is, given the references known to be so: the least fixed point.
    """
    pending = {ref: _target(schema, ref) for ref in _references(schema)}
    finite: set[str] = set()
    while found := {ref for ref, target in pending.items() if _is_finite(target, finite)}:
        finite |= found
        pending = {ref: target for ref, target in pending.items() if ref not in found}
    return _is_finite(schema, finite)


def _is_finite(schema: Any, finite: Collection[str]) -> bool:
    if not isinstance(schema, Mapping):
        return schema is not False
    if isinstance(schema.get("$ref"), str) and schema["$ref"] not in finite:
        return False
    if not all(_is_finite(one, finite) for one in _listed(schema, "allOf")):
        return False
    for name in ("anyOf", "oneOf"):
        options = _listed(schema, name)
        if options and not any(_is_finite(one, finite) for one in options):
            return False
    match schema.get("type"):
        case "object":
            return all(_is_finite(one, finite) for one in _required(schema))
        case "array":
            return all(_is_finite(one, finite) for one in _first_items(schema))
    return True


def _required(schema: Mapping[str, Any]) -> Iterator[Any]:
    """The schemas of an object's required properties."""
    given = schema.get("properties")
    properties = given if isinstance(given, Mapping) else {}
    for name in _listed(schema, "required"):
        known = isinstance(name, str) and name in properties
        yield properties[name] if known else schema.get("additionalProperties")


def _first_items(schema: Mapping[str, Any]) -> list[Any]:
    """The schemas of the items that an array has in any case."""
    least = schema.get("minItems", 0)
    if not isinstance(least, int | float) or least < 1:
        return []
    prefix = _listed(schema, "prefixItems")
    return prefix[: int(least)] + ([schema.get("items")] if least > len(prefix) else [])


def _listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    found = schema.get(name)
    return list(found) if isinstance(found, list | tuple) else []


def _references(schema: Any) -> Iterator[str]:
    """All references anywhere; one in mere data costs a look and changes nothing."""
    if isinstance(schema, Mapping):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        schema = list(schema.values())
    if isinstance(schema, list | tuple):
        for one in schema:
            yield from _references(one)


def _target(root: Mapping[str, Any], ref: str) -> Any:
    """What a reference points to; True, which any value satisfies, where it is none into this document."""
    found: Any = root
    if not ref.startswith("#") or (ref != "#" and not ref.startswith("#/")):
        return True
    for part in unquote(ref).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return True
    return found
