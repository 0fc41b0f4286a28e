"""The short names that stand for models on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class ShortName:
    """A model on the hub."""

    repo_id: str


SHORT_NAMES: Mapping[str, ShortName] = MappingProxyType(
    {
        "qwen2-0.5b": ShortName("Qwen/Qwen2-0.5B-Instruct"),
        "qwen2-1.5b": ShortName("Qwen/Qwen2-1.5B-Instruct"),
    }
)


def short_names() -> list[str]:
    """Return every short name, family by family and by size."""
    return list(SHORT_NAMES)
