"""A JSON file's fields, read with their types checked: what each reader of a config.json is made of.

Owns the errors about a field and about a file. Refuses to know what any field means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tiny_llm.errors import ConfigError

_T = TypeVar("_T")


def read_file(path: Path, read: Callable[[Mapping[str, object]], _T]) -> _T:
    """Return what ``read`` makes of the JSON object in a file. Raises ConfigError that names the file."""
    raw = read_object(path)
    try:
        return read(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds. Raises ConfigError that names the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}). A model folder holds config.json, "
            "safetensors files and tokenizer.json."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}). Download or save it again.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a JSON {type(raw).__name__}, expected an object.")
    return raw


class Fields:
    """A JSON object's fields with their types checked. Null counts as absent.

    A field that is absent has the ``default``; without one, that raises ConfigError, as a wrong type does.
    """

    def __init__(self, raw: Mapping[str, object], inside: str = "") -> None:
        self._raw = raw
        self._inside = inside

    def get(self, name: str) -> object:
        """The value as it stands; None where there is none."""
        return self._raw.get(name)

    def names(self) -> set[str]:
        """The fields that have a value."""
        return {name for name, value in self._raw.items() if value is not None}

    def wrong(self, name: str, expected: str) -> ConfigError:
        """What to raise about a field: what it is, or that it is missing, and what it should be."""
        label = f"{self._inside}.{name}" if self._inside else name
        given = self.get(name)
        if given is None:
            return ConfigError(f"{label} is missing, expected {expected}.")
        return ConfigError(f"{label} is {given!r}, expected {expected}.")

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def whole(self, name: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """A whole number from ``least`` to ``most``."""
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"a whole number from {least} to {most:,}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise self.wrong(name, "a positive number")
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of positive numbers."""
        value = self.get(name)
        if not isinstance(value, list):
            raise self.wrong(name, "a list of positive numbers")
        return tuple(Fields({name: number}, self._inside).number(name) for number in value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them, as a tuple; () where it is absent."""
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.wrong(name, "a token id, or a list of them")
        return tuple(ids)

    def section(self, name: str) -> Fields | None:
        """An object inside; None where it is absent or empty."""
        value = self.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, name)

    def _value(self, name: str, default: object) -> object:
        value = self.get(name)
        return default if value is None else value
