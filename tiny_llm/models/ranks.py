"""Which part of a decoder's tensors each rank of a group has, and how much travels between them.

Every matrix is cut by its outputs, attention by heads; what a row of it meets is whole on each rank. Refuses
to know how bytes travel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from tiny_llm.config import ModelConfig, ModelFacts
from tiny_llm.errors import ConfigError
from tiny_llm.layers.gathered import share_of
from tiny_llm.layers.named import Shapes

_CUT = re.compile(r"\.([qkvo]|gate|up|down)_proj\.(weight|bias)$|(embed_tokens|lm_head)\.weight$")


class Gathered(NamedTuple):
    """What a rank gets from the others in a step: bytes for each token, of ``layer`` one (one with experts,
    if there are some) and in all, and for each row of logits; and how many times something is gathered.
    """

    layer: int
    token: int
    logits: int
    gathers: int


def of_rank(config: ModelConfig, size: int) -> ModelConfig:
    """The config of what one of ``size`` ranks attends with: its heads, and those of keys and values that
    these read, which several ranks have where there are fewer than ranks.
    """
    heads, kv_heads = config.num_heads // size, max(1, config.num_kv_heads // size)
    return config if size == 1 else replace(config, num_heads=heads, num_kv_heads=kv_heads)


def rank_parts(config: ModelConfig, shapes: Shapes, rank: int, size: int) -> Mapping[str, range]:
    """The rows of each tensor of ``shapes`` of which this rank has some; those it has whole are left out.

    Raises ConfigError for a number of ranks that cannot share the model.
    """
    _check(config, size)
    D, K, own = config.head_dim, config.num_kv_heads, of_rank(config, size)
    queries = range(rank * own.num_heads * D, (rank + 1) * own.num_heads * D)
    first = rank * K // size * D
    keys = range(first, first + own.num_kv_heads * D)
    heads = {"q": queries, "k": keys, "v": keys}
    parts: dict[str, range] = {}
    for name, shape in shapes.items():
        if found := _CUT.search(name):
            rows = shape[max(len(shape) - 2, 0)]
            parts[name] = heads.get(found[1]) or share_of(rows, rank, size)
            if found[1] not in heads and not share_of(rows, size - 1, size):
                raise ConfigError(f"{size} ranks (--ranks) are too many: {name} has {rows} rows.")
    return parts


def _check(config: ModelConfig, size: int) -> None:
    if config.qk_norm == "whole":
        raise ConfigError(
            f"{config.model_type} cannot be split over ranks (--ranks): its queries are normed all together."
        )
    able = [n for n in range(1, config.num_heads + 1) if _divides(config, n)]
    if size not in able:
        raise ConfigError(
            f"{size} ranks (--ranks) cannot share {config.num_heads} heads of queries and "
            f"{config.num_kv_heads} of keys and values, expected one of {', '.join(map(str, able))}."
        )


def _divides(config: ModelConfig, size: int) -> bool:
    H, K = config.num_heads, config.num_kv_heads
    return H % size == 0 and (K % size == 0 or size % K == 0)


def gathered_bytes(config: ModelFacts, ranks: int, item_bytes: int = 4) -> Gathered:
    """What each of ``ranks`` gets from the others, activations being of ``item_bytes``.

    A layer gathers attention's output [T, H D] and what is made of it [T, E], the MLP's middle [T, F] and its
    output [T, E]; of experts the middle of all k that a token is sent to, and a shared one has a pair of its
    own. Of each a rank lacks ``ranks - 1`` parts. Of the embedding [T, E] each rank sends all.
    """

    def lacking(width: int) -> int:
        return item_bytes * (ranks - 1) * -(-width // ranks)

    E, F, L = config.hidden_size, config.intermediate_size, config.num_layers
    attention = lacking(config.num_heads * config.head_dim) + lacking(E)
    facts = config.experts if isinstance(config, ModelConfig) else None
    layer, dense, gathers, mixed = attention + lacking(F) + lacking(E), 0, 4 * L, L
    if facts is not None:
        mixed, dense = len(facts.layers), attention + lacking(facts.dense_width) + lacking(E)
        layer = attention + facts.per_token * lacking(facts.width) + lacking(E)
        if facts.shared_width:
            layer, gathers = layer + lacking(facts.shared_width) + lacking(E), gathers + 2 * mixed
    token = mixed * layer + (L - mixed) * dense + item_bytes * E * (ranks - 1)
    return Gathered(layer, token, lacking(config.vocab_size), gathers + 2)
