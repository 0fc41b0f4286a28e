"""The short names that stand for models on the hub, with the facts those models publish.

Owns how names.toml is read: repository, parameter count, size, and what matters of config.json, so that a
model can be sized or filled with random weights without a network. Refuses to know what is on disk.
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tiny_llm.errors import ConfigError, did_you_mean

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True, slots=True)
class ShortName:
    """A published model: its hub id, its parameters, and config.json's facts.

    ``duplicate_parameters`` counts a tied head that the repository stores once more; nearly all are
    published in ``bytes_a_parameter`` of 2, as bfloat16.
    """

    repo_id: str
    parameters: int
    facts: Mapping[str, object]
    duplicate_parameters: int = 0
    bytes_a_parameter: int = 2

    @property
    def download_bytes(self) -> int:
        """Size of the weight files; the tokenizer adds some 10 MB."""
        return (self.parameters + self.duplicate_parameters) * self.bytes_a_parameter


@cache
def short_names() -> Mapping[str, ShortName]:
    """Every short name and what it stands for, in the file's order."""
    read = tomllib.loads(Path(__file__).with_name("names.toml").read_text(encoding="utf-8"))
    return MappingProxyType({name: _model(row, read["group"]) for name, row in read["model"].items()})


def config_of(name: str) -> dict[str, object]:
    """Return the facts of a short name's config.json, as a new dict for ``ModelConfig.from_hf``.

    Raises ConfigError, with near names, for an unknown one.
    """
    if name not in short_names():
        raise ConfigError(f"There is no short name {name!r}.{did_you_mean(name, short_names())}")
    return copy.deepcopy(dict(short_names()[name].facts))


def _model(row: dict[str, Any], groups: Mapping[str, Any]) -> ShortName:
    counts = {name: row.pop(name) for name in ("duplicate_parameters", "bytes_a_parameter") if name in row}
    repo_id, parameters = row.pop("repo_id"), row.pop("parameters")
    return ShortName(repo_id, parameters, MappingProxyType(_facts(row, groups)), **counts)


def _facts(row: Mapping[str, Any], groups: Mapping[str, Any]) -> dict[str, object]:
    """What a model or a group says of config.json, on top of what the group says that it is ``like``."""
    own = dict(row)
    facts = _facts(groups[own.pop("like")], groups) if "like" in own else {}
    if "sizes" in own:
        facts |= zip(_SIZES, own.pop("sizes"), strict=True)
    return facts | dict.fromkeys(own.pop("null", ())) | own
