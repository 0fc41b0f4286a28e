"""RoPE's facts in a config.json: how fast heads are turned, how much of each, and how that is stretched.

Both ways in which transformers 4 and 5 write them. Refuses to know what frequencies are made of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Literal

from tiny_llm.config_fields import Fields
from tiny_llm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How RoPE's frequencies are stretched for contexts beyond the trained one.

    "linear" divides every frequency by ``factor``. "llama3" and "yarn" divide only slow ones, fewer by how
    often they turn in the trained context: from ``low_freq_factor`` to ``high_freq_factor`` times is between.
    "factors" divides each by its own of ``factors`` (longrope; GGUF files). What turned queries and keys are
    multiplied by, each, is ``attention_factor``. ``truncate``: YaRN's range ends at whole pairs.
    """

    kind: Literal["linear", "llama3", "factors", "yarn"]
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0
    factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    truncate: bool = True


def read_rope(fields: Fields, head_dim: int, positions: int, *, partial: bool) -> Mapping[str, object]:
    """Return theta, scaling, how much is turned and the longest context, as facts of a ModelConfig.

    They come from ``rope_theta`` + ``rope_scaling`` or from ``rope_parameters``. ``partial``: the family may
    turn a part of a head.
    """
    sections = [s for s in map(fields.section, ("rope_scaling", "rope_parameters")) if s is not None]
    rotary_dim = _rotary_dim(fields, sections, head_dim, partial)
    scalings = {_scaling(section, fields, rotary_dim // 2, positions) for section in sections} or {None}
    named = [part for part in (fields, *sections) if part.get("rope_theta") is not None]
    thetas = {part.number("rope_theta") for part in named} or {10_000.0}
    if len(scalings) > 1 or len(thetas) > 1:
        raise ConfigError(
            "rope_theta, rope_scaling and rope_parameters contradict each other. Keep one spelling: "
            "rope_theta with rope_scaling, or rope_parameters alone."
        )
    scaling, part = scalings.pop(), 0 if rotary_dim == head_dim else rotary_dim
    if scaling is not None and scaling.kind == "yarn":  # Qwen2.5 leaves the limit at what was trained
        positions = max(positions, int(scaling.factor * scaling.original_max_position_embeddings))
    return {
        "rope_theta": thetas.pop(),
        "rope_scaling": scaling,
        "rotary_dim": part,
        "max_position_embeddings": positions,
    }


def _rotary_dim(fields: Fields, sections: list[Fields], head_dim: int, partial: bool) -> int:
    name = "partial_rotary_factor"
    for section in (*sections, fields):
        share = section.number(name, 1.0)
        turned = int(head_dim * share)
        if share != 1 and (not partial or share > 1 or turned % 2 or turned == 0):
            what = "a share of a head with an even number of entries" if partial else "1"
            raise section.wrong(name, f"{what}, since all of a head is rotated" if not partial else what)
        if share != 1:
            return turned
    return head_dim


_FIELDS: Set[str] = {
    *("type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "factors"),
    *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_MORE: Mapping[str, Set[str]] = {
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"attention_factor", "short_factor", "long_factor"},
    **dict.fromkeys(("default", "linear", "dynamic", "factors", "llama3"), frozenset[str]()),
}


def _scaling(section: Fields, fields: Fields, pairs: int, positions: int) -> RopeScaling | None:
    name = "rope_type" if section.get("rope_type") is not None else "type"
    kind = section.text(name, None if section.get("factor") is not None else "default")
    kind = "longrope" if kind == "su" else kind  # as the first files of Phi-3 call it
    if kind not in _MORE:
        raise section.wrong(name, "'default', 'linear', 'dynamic', 'llama3', 'yarn' or 'longrope'")
    unknown = sorted(section.names() - _FIELDS - _MORE[kind])
    if unknown:
        raise section.wrong(unknown[0], f"only fields of rope type {kind!r}")
    if kind in ("default", "dynamic"):  # "dynamic" begins beyond max_position_embeddings, where we end
        return None
    if kind == "linear":
        return RopeScaling("linear", section.number("factor"))
    if kind == "factors":
        return RopeScaling("factors", 1.0, factors=section.numbers("factors"))
    of_model = fields.get("original_max_position_embeddings")  # transformers gives it the precedence
    whole = (section if of_model is None else fields).whole
    original = whole("original_max_position_embeddings", None if kind == "llama3" else positions)
    if kind == "llama3":
        low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
        if high <= low:
            raise section.wrong("high_freq_factor", f"a number above low_freq_factor, which is {low}")
        return RopeScaling("llama3", section.number("factor"), low, high, original)
    return _yarn(section, original) if kind == "yarn" else _longrope(section, original, pairs, positions)


def _yarn(section: Fields, original: int) -> RopeScaling:
    """YaRN (Peng et al. 2023): pairs that turn more than ``beta_fast`` times are kept."""
    factor, whole = section.number("factor"), section.flag("truncate", True)
    slow, fast = section.number("beta_slow", 1.0), section.number("beta_fast", 32.0)
    if fast <= slow:
        raise section.wrong("beta_fast", f"a number above beta_slow, which is {slow}")
    attention = _mscale(factor)
    if section.get("mscale") is not None and section.get("mscale_all_dim") is not None:
        attention = _mscale(factor, section.number("mscale")) / _mscale(
            factor, section.number("mscale_all_dim")
        )
    attention = section.number("attention_factor", attention)
    return RopeScaling("yarn", factor, slow, fast, original, (), attention, whole)


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(section: Fields, original: int, pairs: int, positions: int) -> RopeScaling:
    """LongRoPE (Ding et al. 2024) by the long factors where the context goes beyond the original one.

    transformers takes the short ones while a sequence is short: then its keys would have to be turned anew
    on the way. Ours are the same at any length, so that a request's tokens do not depend on that.
    """
    lists = {name: section.numbers(name) for name in ("short_factor", "long_factor")}
    for name, factors in lists.items():
        if len(factors) != pairs:
            raise section.wrong(name, f"{pairs} numbers, one for each pair that is turned")
    stretch = section.number("factor", positions / original)
    attention = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    factors = lists["long_factor" if positions > original else "short_factor"]
    attention = section.number("attention_factor", attention)
    return RopeScaling("factors", 1.0, factors=factors, attention_factor=attention)
