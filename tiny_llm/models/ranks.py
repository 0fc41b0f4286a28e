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


def head_rows(config: ModelConfig, rank: int, size: int) -> tuple[range, range]:
    """A rank's rows of ``q_proj``, and those of ``k_proj`` and ``v_proj`` that its queries read."""
    own, D = of_rank(config, size), config.head_dim
    queries, keys = own.num_heads * D, own.num_kv_heads * D
    first = rank * config.num_kv_heads // size * D
    return range(rank * queries, (rank + 1) * queries), range(first, first + keys)


def rank_parts(config: ModelConfig, shapes: Shapes, rank: int, size: int) -> Mapping[str, range]:
    """The rows of each tensor of ``shapes`` of which this rank has some; those it has whole are left out.

    Raises ConfigError for a number of ranks that cannot share the model.
    """
    _check(config, size)
    queries, keys = head_rows(config, rank, size)
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


def lacking(width: int, ranks: int) -> int:
    """How many numbers a rank gets from the others to have all ``width`` of a row; each gives as many."""
    return (ranks - 1) * len(share_of(width, 0, ranks))


def layer_lacks(config: ModelFacts, middle: int, ranks: int) -> int:
    """The same of all that a layer gathers for a token, the MLP's middle having ``middle`` numbers.

    That is attention's output [H D], what is made of it [E], the middle, and the MLP's output [E].
    """
    widths = (config.num_heads * config.head_dim, config.hidden_size, middle, config.hidden_size)
    return sum(lacking(width, ranks) for width in widths)


def gathered_bytes(config: ModelFacts, ranks: int, item_bytes: int = 4) -> Gathered:
    """What each of ``ranks`` gets from the others, activations being of ``item_bytes``.

    Of experts a layer gathers the middle of all k that a token is sent to; a shared one has two gathers
    more. Of the embedding [T, E] each rank sends all.
    """
    E, L = config.hidden_size, config.num_layers
    facts = config.experts if isinstance(config, ModelConfig) else None
    layer, dense, gathers, mixed = layer_lacks(config, config.intermediate_size, ranks), 0, 4 * L, L
    if facts is not None:
        mixed, dense = len(facts.layers), layer_lacks(config, facts.dense_width, ranks)
        layer = layer_lacks(config, facts.width, ranks) + (facts.per_token - 1) * lacking(facts.width, ranks)
        if facts.shared_width:
            layer += lacking(facts.shared_width, ranks) + lacking(E, ranks)
            gathers += 2 * mixed
    token = mixed * layer + (L - mixed) * dense + E * (ranks - 1)
    logits = lacking(config.vocab_size, ranks)
    return Gathered(item_bytes * layer, item_bytes * token, item_bytes * logits, gathers + 2)
